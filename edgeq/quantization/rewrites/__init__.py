"""Rewrite a float model, exactly in FP32, into the operators that a scheme quantises."""
