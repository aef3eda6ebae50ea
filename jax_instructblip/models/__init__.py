"""The networks: pure functions of their parameters.

One alphabet, in shape annotations and einsum strings alike:

    B  batch               L  instruction tokens (Q-Former side)
    G  rows of a batch     X  slots of a row: tokens and visual vectors
    J  samples of a row    A  slots of a row that are asked for a target
    I  images of a row     U  slots of a row of a decoder
    F  frames of a video   T  query side of an attention, tokens of a language model
    H W C  image           S  key side of an attention
    P  patches (and CLS)   N  attention heads
    Q  query vectors       K  width of one head
    D  model width         M  width of a feed-forward layer
    V  vocabulary          R  rows that share one prompt: beams or candidates
    Y  layers of a tower (axis 0 of every stacked leaf)
    Dv Dl Dc               model width of the vision tower, of the language model, and of what an
                           attention looks at

Layers are stacked on axis 0 and scanned; those that decode may be unstacked
(`layers.Scan.unstacked`). Leaves are named only `kernel bias scale embedding queries cls pos_embed
relative_bias`; attention kernels keep their head axis (`[D, N, K]` going in, `[N, K, D]` coming
out).
"""
