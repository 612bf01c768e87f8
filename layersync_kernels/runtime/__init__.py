"""The process: its environment variables and its memory."""
