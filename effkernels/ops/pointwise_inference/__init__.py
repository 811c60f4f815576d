"""The 1x1 convolution with what surrounds it in inference, on the GPU: the phase `pointwise_inference`."""
