"""An experiment that fits a device and a number of minutes, in calls that may be cut."""
