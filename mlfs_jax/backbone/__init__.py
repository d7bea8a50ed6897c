"""The networks themselves: layers with named axes, and one encoder for all its families."""
