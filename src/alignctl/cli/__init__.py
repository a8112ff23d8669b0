"""The command line. A command is a few lines; `app.main` is the only place that prints an error and exits."""
