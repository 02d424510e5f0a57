"""The page at `/`: chat, a live view of the engines, sessions. Its files are text without secrets; its data needs the key."""
