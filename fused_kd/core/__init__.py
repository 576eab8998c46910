"""What every layer shares: the catalogue of losses, checks of arguments, how gradients are stored.

Of the rest of the package it imports the reference alone.
"""
