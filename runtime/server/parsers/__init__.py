"""What a model's text means: thoughts, tool calls, or plain answer. One format a file."""
