"""What the doctor knows and asks: rules, facts of a machine, checks of them."""
