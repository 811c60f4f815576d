"""The 1x1 expansion and the depthwise convolution in one kernel: the phase `expand_dwconv`."""
