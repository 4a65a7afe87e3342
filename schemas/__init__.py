"""The contract: what was said, how it is written down, and by what names.

The lowest floor: it imports nothing of ours, and every other folder may import it.
"""
