"""`bigain search`: which method, ratio, factor and alpha in which block meet a target speed or an error budget."""
