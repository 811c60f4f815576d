"""The 1x1 convolution with what comes before it applied on load, and its backward."""
