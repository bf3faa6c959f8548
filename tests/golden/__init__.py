"""What the package makes of small recipes and bad inputs, recorded before a change and compared after it."""
