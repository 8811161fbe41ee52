"""Run the device script where an artifact will run, and read its report."""
