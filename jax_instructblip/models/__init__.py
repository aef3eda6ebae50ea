"""The neural networks: Flax modules and pure functions of their parameters.

A tower is one of the three networks of a model: the vision encoder, the bridge from its patches to
the language model, or the language model. Shape annotations and einsum strings use the same
letters:

    B  batch                             L  tokens of the instruction that the Q-Former reads
    G  rows of a batch                   X  slots of a row; a slot is a token or a visual vector
    J  samples packed into a row         A  targets of a row: the slots whose logits are computed
    I  images of a row                   U  slots of a decoder's row (encoder-decoder models)
    F  frames of a video                 T  queries of an attention, tokens of a language model
    H W C  image                         S  keys of an attention
    P  patches, CLS included             N  attention heads
    Q  query vectors of the Q-Former     K  width of one head
    D  model width                       M  width of a feed-forward layer
    V  vocabulary                        R  rows that share one prompt: beams or candidates
    E  width of BLIP-2's features        Y  layers of a tower (axis 0 of every stacked leaf)
    Dv Dl Dc  model width of the vision tower, of the language model, and of the vectors that a
              cross-attention reads

The layers of a tower are stacked on axis 0 and run by `nn.scan`; layers that decode may instead be
kept as one parameter tree each (`layers.Scan.unstacked`). Parameter leaves have only the names
`kernel bias scale embedding queries cls pos_embed relative_bias temp`. Attention kernels keep their
head axis: `[D, N, K]` for query, key and value, `[N, K, D]` for the output.
"""
