"""What every layer shares: the catalogue of losses, checks of arguments, how gradients are stored. Of the rest it imports the reference alone."""
