"""Initial weights for pretraining a small OPT in minutes: random, but arranged so that copying is learnt at once.

To continue "A B ... A" with B takes two heads that work together (an induction head): one that brings a token's
predecessor to it, and one that looks for the place whose predecessor is the current token. From plain random
weights gradient descent finds the pair very late, since neither helps alone (Olsson et al., "In-context learning and
induction heads", arXiv 2209.11895). Here both are sketched in the first two layers, faintly, and training does the
rest. The other layers start with keys equal to queries, so that like attends to like (after Trockman and Kolter,
"Mimetic initialization of self-attention layers", arXiv 2305.09828).
"""

import math

import torch

EMBEDDING_STD = 0.1  # of token and position embeddings; five times OPT's, so that training does not blur rare tokens
SHARPNESS = 40.0  # attention logit of a first-layer head at the place it looks for, before the layer's noise
LONGEST_WAVE = 60.0  # of the positions' sinusoids, in units of the shortest, which is 2 pi tokens


@torch.no_grad()
def sketch_induction_heads(model) -> None:
    """Arrange the random weights of an `OPTForCausalLM` with norms before the layers, in place.

    A quarter of the width D holds positions, as sinusoids, and the rest tokens. Head h of layer 0 looks h + 1
    tokens back; the heads of layer 1 look for the place that head 0 marked with the current token, and copy what
    they find there. Draws from torch's global generator.
    """
    decoder, width, heads = model.model.decoder, model.config.hidden_size, model.config.num_attention_heads
    places = width // 4
    waves = torch.exp(torch.linspace(0, -math.log(LONGEST_WAVE), places // 2))  # (places / 2,) radians a token
    _embed(decoder, waves, places)
    marked, mark = None, None
    for number, layer in enumerate(decoder.layers):
        layer.fc1.weight.normal_(std=0.06)
        attention = layer.self_attn
        for head in range(heads):
            part = slice(head * width // heads, (head + 1) * width // heads)
            if number == 0:
                read, write = _look_back(attention, part, waves, places, steps=head + 1)
                if head == 0:
                    marked, mark = read, write
            elif number == 1:
                attention.q_proj.weight[part], attention.k_proj.weight[part] = 3 * marked, 3 * mark
            else:
                attention.q_proj.weight[part] = attention.k_proj.weight[part] = _token_rows(marked.shape, places)
        if number == 1:
            rotation = torch.linalg.qr(torch.randn(width, width)).Q
            attention.v_proj.weight.copy_(rotation)
            attention.out_proj.weight.copy_(3 * EMBEDDING_STD * rotation.T)


def _embed(decoder, waves, places):
    """Tokens in the last dimensions, positions in the first `places`, all with the same standard deviation."""
    tokens, positions = decoder.embed_tokens, decoder.embed_positions.weight
    tokens.weight.normal_(std=EMBEDDING_STD)
    tokens.weight[:, :places] = 0
    tokens.weight[tokens.padding_idx] = 0
    angles = torch.arange(len(positions))[:, None] * waves  # (positions, places / 2)
    positions.zero_()
    positions[:, 0:places:2] = math.sqrt(2) * EMBEDDING_STD * angles.sin()
    positions[:, 1:places:2] = math.sqrt(2) * EMBEDDING_STD * angles.cos()


def _look_back(attention, part, waves, places, steps):
    """Let a head look `steps` tokens back and write what stands there in other directions; both as rows (size, D)."""
    size = part.stop - part.start
    pairs = torch.linspace(0, places // 2 - 1, size // 2).round().long()
    gain = math.sqrt(SHARPNESS / math.sqrt(size))  # size / 2 pairs contribute 2 gain^2 / sqrt(size) each
    query, key = torch.zeros(2, size, attention.q_proj.weight.shape[1])
    for row, pair in enumerate(pairs.tolist()):
        sine, cosine = math.sin(waves[pair] * steps), math.cos(waves[pair] * steps)
        for offset, weights in ((0, (cosine, sine)), (1, (-sine, cosine))):  # the key's position, moved `steps` ahead
            query[2 * row + offset, 2 * pair + offset] = gain
            key[2 * row + offset, 2 * pair], key[2 * row + offset, 2 * pair + 1] = (gain * w for w in weights)
    attention.q_proj.weight[part], attention.k_proj.weight[part] = query, key
    read, write = _token_rows(query.shape, places), _token_rows(query.shape, places)
    attention.v_proj.weight[part] = read
    attention.out_proj.weight[:, part] = (4.5 if steps == 1 else 1.4) * EMBEDDING_STD * write.T
    return read, write


def _token_rows(shape, places):
    """Random orthonormal rows (size, D) within the tokens' dimensions."""
    size, width = shape
    rows = torch.zeros(size, width)
    rows[:, places:] = torch.linalg.qr(torch.randn(width - places, size)).Q.T
    return rows
