"""First weights for a small OPT that is trained from scratch: random, with induction heads sketched in.

An induction head continues "A B ... A" with B, that is, it copies. It takes two attention heads that work
together. One brings each token the token before it. The other looks for the place whose previous token equals
the current one. Neither lowers the loss alone, so gradient descent from plain random weights finds the pair
very late (Olsson et al., "In-context learning and induction heads", arXiv 2209.11895). Here both heads are
sketched faintly in the first two layers, and training does the rest. In the other layers the key weights
start equal to the query weights, so that a token attends to tokens like itself (after Trockman and Kolter,
"Mimetic initialization of self-attention layers", arXiv 2305.09828).
"""

import math

import torch

# Standard deviation of token and position embeddings. It is five times OPT's, because with OPT's the
# embeddings of rare tokens blur into each other during training.
EMBEDDING_STD = 0.1
SHARPNESS = 40.0  # attention logit of a first-layer head at the place it looks for, before LayerNorm's noise
LONGEST_WAVE = 60.0  # longest wavelength of the position sinusoids / the shortest, which is 2 pi tokens


@torch.no_grad()
def sketch_induction_heads(model) -> None:
    """Overwrite random weights of an `OPTForCausalLM` in place. Draws from torch's global generator.

    A quarter of the width D holds positions, as sinusoids. The rest holds tokens. Head h of layer 0 looks h +
    1 tokens back. The heads of layer 1 look for the place that head 0 of layer 0 marked with the current
    token, and copy the token at that place.

    Raises:
        ValueError: unless the model has LayerNorm before each layer, no embedding projection, and at least
            two heads and two layers.
    """
    config = model.config
    width, heads = config.hidden_size, config.num_attention_heads
    if not config.do_layer_norm_before or config.word_embed_proj_dim != width:
        raise ValueError("needs an OPT with LayerNorm before its layers and without an embedding projection")
    if heads < 2 or config.num_hidden_layers < 2:
        raise ValueError("needs an OPT with at least two heads and two layers")
    decoder, position_dims = model.model.decoder, width // 4
    # frequencies of the sinusoids in radians a token: (P / 2,)
    waves = torch.exp(torch.linspace(0, -math.log(LONGEST_WAVE), position_dims // 2))
    _embed(decoder, waves, position_dims)
    # what head 0 of layer 0 reads of a token, and the mark that it writes: (D / heads, D) each
    read, write = None, None
    for number, layer in enumerate(decoder.layers):
        layer.fc1.weight.normal_(std=0.06)
        attention = layer.self_attn
        for head in range(heads):
            rows = slice(head * width // heads, (head + 1) * width // heads)
            if number == 0:
                directions = _look_back(attention, rows, waves, position_dims, steps=head + 1)
                if head == 0:
                    read, write = directions
            elif number == 1:
                attention.q_proj.weight[rows], attention.k_proj.weight[rows] = 3 * read, 3 * write
            else:
                like = _token_rows(read.shape, position_dims)
                attention.q_proj.weight[rows] = attention.k_proj.weight[rows] = like
        if number == 1:
            rotation = torch.linalg.qr(torch.randn(width, width)).Q  # (D, D) orthogonal
            attention.v_proj.weight.copy_(rotation)
            attention.out_proj.weight.copy_(3 * EMBEDDING_STD * rotation.T)


def _embed(decoder, waves, position_dims):
    """Positions in the first `position_dims` dimensions, tokens in the others, equal standard deviations."""
    tokens, positions = decoder.embed_tokens, decoder.embed_positions.weight  # (V, D), (positions, D)
    tokens.weight.normal_(std=EMBEDDING_STD)
    tokens.weight[:, :position_dims] = 0
    tokens.weight[tokens.padding_idx] = 0
    angles = torch.arange(len(positions))[:, None] * waves  # (positions, P / 2)
    positions.zero_()
    positions[:, 0:position_dims:2] = math.sqrt(2) * EMBEDDING_STD * angles.sin()
    positions[:, 1:position_dims:2] = math.sqrt(2) * EMBEDDING_STD * angles.cos()


def _look_back(attention, rows, waves, position_dims, steps):
    """Make a head look `steps` tokens back and write the token it sees there into other directions.

    Args:
        rows: of the projections' weights that belong to the head.

    Returns:
        What it reads and what it writes, orthonormal rows (D / heads, D) each.
    """
    size = rows.stop - rows.start
    # the sinusoids that the head uses: (D / heads / 2,)
    pairs = torch.linspace(0, position_dims // 2 - 1, size // 2).round().long()
    gain = math.sqrt(SHARPNESS / math.sqrt(size))  # size / 2 sinusoids contribute 2 gain^2 / sqrt(size) each
    query, key = torch.zeros(2, size, attention.q_proj.weight.shape[1])  # (D / heads, D) each
    for row, pair in enumerate(pairs.tolist()):
        sine, cosine = math.sin(waves[pair] * steps), math.cos(waves[pair] * steps)
        # the key's position is rotated `steps` ahead, so that it matches the query `steps` tokens later
        for offset, weights in ((0, (cosine, sine)), (1, (-sine, cosine))):
            query[2 * row + offset, 2 * pair + offset] = gain
            key[2 * row + offset, 2 * pair], key[2 * row + offset, 2 * pair + 1] = (gain * w for w in weights)
    attention.q_proj.weight[rows], attention.k_proj.weight[rows] = query, key
    read, write = _token_rows(query.shape, position_dims), _token_rows(query.shape, position_dims)
    attention.v_proj.weight[rows] = read
    # the head that the second layer relies on writes more than the others
    attention.out_proj.weight[:, rows] = (4.5 if steps == 1 else 1.4) * EMBEDDING_STD * write.T
    return read, write


def _token_rows(shape, position_dims):
    """Random orthonormal rows (size, D) that are 0 in the position dimensions."""
    size, width = shape
    rows = torch.zeros(size, width)
    rows[:, position_dims:] = torch.linalg.qr(torch.randn(width - position_dims, size)).Q.T
    return rows
