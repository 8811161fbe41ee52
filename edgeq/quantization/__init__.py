"""Turn an equalised float model and its calibration into a QDQ model, as a scheme says."""
