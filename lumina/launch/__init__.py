"""`lumina launch`: starts the ranks of a run, shows what they say, and starts them again when one dies.

It stands inside the package, for it is a part of the command; the folder `launch/` at the top of the tree holds what a
shell or a scheduler runs. It imports the configuration alone, and so starts and ends in no time.
"""
