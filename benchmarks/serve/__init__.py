"""Load against any server that speaks OpenAI's completions or chats: what its users would see."""
