"""The commands of ``hf-onebit``, a file each: its arguments, the call, what is printed."""
