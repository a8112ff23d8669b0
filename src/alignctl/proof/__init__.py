"""What is asked of a finished run: evaluation, chat, merging, publishing. Everything is read from its folder."""
