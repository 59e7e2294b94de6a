"""Attention, embeddings and group norms of members equal torch.nn's, member by member."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from effens_kernels.nn import (
    BatchEnsembleEmbedding,
    BatchEnsembleMultiheadAttention,
    EnsembleBatchNorm3d,
    EnsembleGroupNorm,
    EnsembleLayerNorm,
)

E, B, L, S, D, H = 3, 2, 5, 4, 8, 2
DOUBLE = {"dtype": torch.float64}


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def all_gradients(results: list[Tensor], parameters: list[Tensor]) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    total = sum((y * torch.randn(y.shape, **DOUBLE)).sum() for y in results)
    return torch.autograd.grad(total, parameters, retain_graph=True, materialize_grads=True)


OPTIONS = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "other widths": {"kdim": 6, "vdim": 7},
    "added tokens": {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
    "no bias": {"bias": False},
}
MASKS = ("none", "causal", "tokens", "padding", "both", "numbers")


def masks(kind: str, keys: int) -> dict[str, object]:
    hidden, padding = torch.rand(L, keys) < 0.4, torch.rand(E * B, keys) < 0.4
    hidden[:, 0] = padding[:, 0] = False
    return {
        "none": {},
        "causal": {"attn_mask": torch.ones(L, keys, dtype=torch.bool).triu(1), "is_causal": True},
        "tokens": {"attn_mask": hidden},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": hidden, "key_padding_mask": padding},
        "numbers": {
            "attn_mask": torch.randn(E * B * H, L, keys, **DOUBLE),
            "key_padding_mask": torch.randn(E * B, keys, **DOUBLE),
        },
    }[kind]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("weights", [{"average_attn_weights": False}, {"need_weights": False}], ids=str)
def test_attention_of_members(options, mask, weights):
    """Self-attention and that to other tokens; results, weights, and gradients of inputs."""
    options = OPTIONS[options]
    layer = BatchEnsembleMultiheadAttention(D, H, E, std=0.5, **options, **DOUBLE).eval()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.randn_like(p))
    first = options.get("batch_first", False)

    def tokens(length: int, features: int) -> Tensor:
        x = torch.randn(E * B, length, features, **DOUBLE)
        return (x if first else x.transpose(0, 1)).requires_grad_()

    def rows(x: Tensor, e: int) -> Tensor:
        own = slice(e * B, (e + 1) * B)
        return x[own] if first else x[:, own]

    query, key, value = tokens(L, D), tokens(S, options.get("kdim", D)), tokens(S, options.get("vdim", D))
    calls = [(query, key, value)] if "kdim" in options else [(query, query, query), (query, key, key)]
    for inputs in calls:
        how = {**masks(mask, L if inputs[1] is query else S), **weights}
        y, found = layer(*inputs, **how)
        loops: list[tuple[Tensor, Tensor | None]] = []
        for e in range(E):
            own = [rows(x, e) for x in inputs]
            own = [next(own[m] for m in range(n + 1) if inputs[m] is x) for n, x in enumerate(inputs)]
            each = dict(how)
            if "key_padding_mask" in how:
                each["key_padding_mask"] = how["key_padding_mask"][e * B : (e + 1) * B]
            if "attn_mask" in how and how["attn_mask"].dim() == 3:
                each["attn_mask"] = how["attn_mask"].view(E, B * H, L, -1)[e]
            plain = layer._plain(e)
            loops.append(plain(*own, **each))
            alone, _ = layer(*own, **each, member=e)
            close(alone, loops[-1][0])
        expected = torch.cat([result for result, _ in loops], 0 if first else 1)
        close(y, expected)
        if "need_weights" in weights:
            assert found is None
        else:
            close(found, torch.cat([w for _, w in loops]))
        distinct = list({id(x): x for x in inputs}.values())
        for actual, grad in zip(*(all_gradients([t], distinct) for t in (y, expected))):
            close(actual, grad)


@pytest.mark.parametrize("options", [{}, {"kdim": 6, "vdim": 7, "add_bias_kv": True}], ids=str)
def test_gradients_of_attentions_parameters(options):
    """Against PyTorch's operations, one member at a time."""
    layer = BatchEnsembleMultiheadAttention(D, H, E, **options, **DOUBLE)
    query, key = torch.randn(L, E * B, D, **DOUBLE), torch.randn(S, E * B, options.get("kdim", D), **DOUBLE)
    value = torch.randn(S, E * B, options.get("vdim", D), **DOUBLE)
    expected = []
    for e in range(E):
        rows = slice(e * B, (e + 1) * B)
        parts = []
        for n, (part, x) in enumerate(zip("qkv", (query, key, value))):
            features = slice(n * D, (n + 1) * D)
            packed = layer.in_proj_weight is not None
            weight = layer.in_proj_weight[features] if packed else getattr(layer, f"{part}_proj_weight")
            r = (layer.in_proj_r if packed else getattr(layer, f"{part}_proj_r"))[e]
            y = (x[:, rows] * r) @ weight.t() * layer.in_proj_s[e, features] + layer.in_proj_bias[e, features]
            if n and layer.bias_k is not None:
                own = (layer.bias_k, layer.bias_v)[n - 1][e].expand(1, B, D)
                y = torch.cat([y, own])
            parts.append(y.unflatten(2, (H, D // H)).permute(1, 2, 0, 3))
        q, k, v = parts
        y = torch.softmax(q @ k.transpose(2, 3) / (D // H) ** 0.5, -1) @ v
        y = y.permute(2, 0, 1, 3).flatten(2) * layer.out_proj.r[e] @ layer.out_proj.weight.t()
        expected.append(y * layer.out_proj.s[e] + layer.out_proj.bias[e])
    parameters = list(layer.parameters())
    for need_weights in (True, False):
        y, _ = layer(query, key, value, need_weights=need_weights)
        for actual, grad in zip(*(all_gradients([t], parameters) for t in (y, torch.cat(expected, 1)))):
            close(actual, grad)


def test_attention_drops_weights_in_training_alone():
    layer = BatchEnsembleMultiheadAttention(D, H, E, 0.5, batch_first=True, init="ones")
    x = torch.randn(B, L, D).repeat(E, 1, 1)
    for need_weights in (True, False):
        y = layer.train()(x, x, x, need_weights=need_weights)[0].view(E, B, L, D)
        assert not torch.allclose(y[0], y[1])
        y = layer.eval()(x, x, x, need_weights=need_weights)[0].view(E, B, L, D)
        torch.testing.assert_close(y[0], y[1])


def test_how_attention_begins():
    layer = BatchEnsembleMultiheadAttention(64, H, E, std=0.2)
    torch.testing.assert_close(layer.in_proj_weight.abs().max(), torch.tensor((6 / 256) ** 0.5), rtol=0.02, atol=0)
    assert not layer.in_proj_bias.any()
    assert not layer.out_proj.bias.any()
    for scale in (layer.in_proj_r, layer.in_proj_s, layer.out_proj.r, layer.out_proj.s):
        assert abs(scale.std().item() - 0.2) < 0.06
    with torch.no_grad():
        for p in layer.parameters():
            p.fill_(7)
    layer.reset_parameters()
    assert not any((p == 7).any() for p in layer.parameters())


def test_embedding_of_members():
    plain = nn.Embedding(11, 6, padding_idx=-3, scale_grad_by_freq=True, **DOUBLE)
    layer = BatchEnsembleEmbedding.from_embedding(plain, E, std=0.5)
    assert layer.padding_idx == 8
    for sizes in ((), (7,), (2, 3)):
        tokens = torch.randint(11, (E * B, *sizes))
        y = layer(tokens)
        assert y.shape == (E * B, *sizes, 6)
        expected = [layer._plain(e)(rows) for e, rows in enumerate(tokens.unflatten(0, (E, B)))]
        close(y, torch.cat(expected))
        for e in range(E):
            close(layer(tokens[:B], member=e), plain(tokens[:B]) * layer.s[e])
    weight, s = all_gradients([layer(tokens)], [layer.weight, layer.s])
    vectors = (plain(tokens).unflatten(0, (E, B)) * layer.s.view(E, 1, 1, 1, 6)).flatten(0, 1)
    expected = all_gradients([vectors], [plain.weight, layer.s])
    close(weight, expected[0])
    close(s, expected[1])
    assert not weight[8].any()
    small = BatchEnsembleEmbedding(11, 6, E, max_norm=0.5, **DOUBLE)
    member = small._plain(1)
    close(small(tokens.flatten(1)).unflatten(0, (E, B))[1], member(tokens.flatten(1)[B : 2 * B]))


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"bias": False}], ids=str)
def test_group_norm_of_members(options):
    plain = nn.GroupNorm(2, 6, **options, **DOUBLE).eval()
    layer = EnsembleGroupNorm.from_groupnorm(plain, E)
    assert not layer.training
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()
    x = torch.randn(E * B, 6, 4, 3, **DOUBLE, requires_grad=True)
    expected = torch.cat([layer._plain(e)(rows) for e, rows in enumerate(x.unflatten(0, (E, B)))])
    close(layer(x), expected)
    close(layer(x[:B], member=0), expected[:B])
    (actual,), (grad,) = (all_gradients([t], [x]) for t in (layer(x), expected))
    close(actual, grad)
    assert layer(x[:0]).shape == x[:0].shape


def test_norms_of_tiled_inputs():
    norm = EnsembleLayerNorm(6, E, tiled=True, **DOUBLE)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    for sizes in ((), (4,), (2, 4)):
        x = torch.randn(E * B, *sizes, 6, **DOUBLE)
        close(norm(x), torch.cat([norm._plain(e)(rows) for e, rows in enumerate(x.unflatten(0, (E, B)))]))
    volumes = EnsembleBatchNorm3d.from_batchnorm(nn.BatchNorm3d(2, **DOUBLE), E)
    x = torch.randn(E, B, 2, 3, 2, 2, **DOUBLE)
    plain = [volumes._plain(e) for e in range(E)]
    close(volumes(x), torch.stack([one(rows) for one, rows in zip(plain, x)]))
    close(volumes.running_var, torch.stack([one.running_var for one in plain]))


def attention(*sizes: object, **options: object) -> BatchEnsembleMultiheadAttention:
    return BatchEnsembleMultiheadAttention(*(sizes or (D, H, E)), batch_first=True, **options)


def attend(query: Tensor | None = None, key: Tensor | None = None, **how: object) -> Tensor:
    query = torch.zeros(E * B, L, D) if query is None else query
    key = query if key is None else key
    return attention()(query, key, key, **how)[0]


BAD = {
    "heads": (lambda: attention(9, 2, E), ValueError, "embed_dim should be a multiple of num_heads=2, got 9"),
    "members": (lambda: attention(D, H, 0), ValueError, "num_members should be at least 1, got 0"),
    "init": (lambda: attention(init="one"), ValueError, "BatchEnsembleMultiheadAttention: init should be one of"),
    "from": (
        lambda: BatchEnsembleMultiheadAttention.from_attention(nn.Linear(2, 2), E),
        TypeError,
        "attention should be a torch.nn.MultiheadAttention, got Linear",
    ),
    "rank": (lambda: attend(torch.zeros(L, D)), ValueError, "query should be [E*B, L, 8] with E=3, got float32[5, 8]"),
    "rows": (
        lambda: attend(torch.zeros(4, L, D)),
        ValueError,
        "query should be [E*B, L, 8] with E=3, got float32[4, 5",
    ),
    "features": (lambda: attend(key=torch.zeros(6, L, 7)), ValueError, "key should be [E*B, L, 8] with E=3, got"),
    "other_rows": (lambda: attend(key=torch.zeros(3, L, D)), ValueError, "key should be of as many rows as query"),
    "type": (lambda: attend(3), TypeError, "query should be a torch.Tensor, got int 3"),
    "mask": (
        lambda: attend(attn_mask=torch.zeros(L, 4)),
        ValueError,
        "attn_mask should be [L=5, S=5] or [12, L=5, S=5]",
    ),
    "mask_type": (
        lambda: attend(attn_mask=torch.zeros(L, L).int()),
        TypeError,
        "attn_mask should be of truth values or",
    ),
    "padding": (lambda: attend(key_padding_mask=torch.zeros(B, L)), ValueError, "key_padding_mask should be [6, S=5]"),
    "causal": (lambda: attend(is_causal=True), ValueError, "attn_mask should be the causal mask with is_causal=True"),
    "member": (lambda: attend(member=E), IndexError, "member should be in [-3, 3), got 3"),
    "embedding": (
        lambda: BatchEnsembleEmbedding(5, 2, E)(torch.zeros(4, dtype=torch.long)),
        ValueError,
        "BatchEnsembleEmbedding: input should be [E*B, ...] with E=3, got int64[4]",
    ),
    "embedding_type": (
        lambda: BatchEnsembleEmbedding(5, 2, E)(torch.zeros(3)),
        TypeError,
        "input should be a tensor of integers, got float32[3]",
    ),
    "padding_idx": (lambda: BatchEnsembleEmbedding(5, 2, E, 5), ValueError, "padding_idx should be in [-5, 5), got 5"),
    "group_norm": (
        lambda: EnsembleGroupNorm(2, 4, E)(torch.zeros(3, 5)),
        ValueError,
        "EnsembleGroupNorm: input should be [E*B, C=4, ...] with E=3, got float32[3, 5]",
    ),
    "groups": (
        lambda: EnsembleGroupNorm(3, 4, E),
        ValueError,
        "num_channels should be a multiple of num_groups=3, got 4",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    make, error, words = BAD[name]
    with pytest.raises(error) as raised:
        make()
    assert words in str(raised.value)
