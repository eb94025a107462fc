"""The weight solvers: matrix [N, K] in, `QTensor` out. They never see the graph or the target."""
