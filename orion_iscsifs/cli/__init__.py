"""The command `orion-iscsifs`: one file per command, loaded when it is called."""
