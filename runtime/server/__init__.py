"""The server: an HTTP process, and an engine process for each artifact. Needs the extra `serve`."""
