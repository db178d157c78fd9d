"""From records to calls: figures, intervals, quality, warnings, the best cell."""
