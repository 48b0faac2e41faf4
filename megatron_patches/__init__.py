"""What Megatron-core needs to run where it does not by itself: one file a patch, applied explicitly.

Empty so far: nothing that Lumina uses of Megatron-core yet needs a patch.
"""
