"""What every layer shares: the catalogue of losses, argument checks, and how gradients are stored.

It imports nothing else of the package but the reference.
"""
