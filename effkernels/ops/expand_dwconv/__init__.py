"""The 1x1 expansion and the depthwise convolution in inference, on the GPU: the phase `expand_dwconv`."""
