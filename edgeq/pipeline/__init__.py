"""Run the stages in order: what the verbs export, check, validate and the Python API call."""
