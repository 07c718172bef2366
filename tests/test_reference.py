"""The oracle against numbers worked out by hand, and against transformers' golden files."""

import json
import math
import pathlib
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.reference import layers, mla, moe, mtp, optimizer, rope, router, transformer

YARN = SimpleNamespace(
    factor=40.0,
    original_max_positions=4096,
    beta_fast=32.0,
    beta_slow=1.0,
    mscale=1.0,
    mscale_all_dim=1.0,
)
ATTENTION = SimpleNamespace(
    nope_dim=3, rope_dim=4, latent_norm_eps=1e-6, rope=SimpleNamespace(theta=1e4, yarn=YARN)
)
MOE = SimpleNamespace(
    num_experts_per_token=2,
    num_groups=2,
    groups_per_token=1,
    score="sigmoid",
    gate_scale=2.5,
    normalize_gates=True,
    balance_counts="best_scores",
)
WIDTH, HEADS, LATENT, VALUE, HIDDEN, EXPERTS, VOCAB = 6, 2, 5, 4, 3, 4, 11


def normal(rng, *shape):
    return rng.normal(size=shape) * 0.5


def mla_weights(rng, q_latent=5):
    head = ATTENTION.nope_dim + ATTENTION.rope_dim
    query = {"w_q_DNA": normal(rng, WIDTH, HEADS, head)}
    if q_latent:
        query = {
            "w_dq_DQ": normal(rng, WIDTH, q_latent),
            "q_norm_Q": 1.0 + normal(rng, q_latent),
            "w_uq_QNA": normal(rng, q_latent, HEADS, head),
        }
    return query | {
        "w_dkvr_DZ": normal(rng, WIDTH, LATENT + ATTENTION.rope_dim),
        "kv_norm_C": 1.0 + normal(rng, LATENT),
        "w_ukv_CNY": normal(rng, LATENT, HEADS, ATTENTION.nope_dim + VALUE),
        "w_o_NHD": normal(rng, HEADS, VALUE, WIDTH),
    }


def swiglu_weights(rng, hidden=HIDDEN):
    return {"w_in_D2F": normal(rng, WIDTH, 2 * hidden), "w_down_FD": normal(rng, hidden, WIDTH)}


def moe_weights(rng):
    return {
        "w_router_DE": normal(rng, WIDTH, EXPERTS),
        "bias_E": np.array([0.0, -0.3, 0.1, 0.0]),
        "w_in_ED2F": normal(rng, EXPERTS, WIDTH, 2 * HIDDEN),
        "w_down_EFD": normal(rng, EXPERTS, HIDDEN, WIDTH),
        "shared": swiglu_weights(rng),
    }


def block_weights(rng, ffn):
    return {
        "attention_norm_D": 1.0 + normal(rng, WIDTH),
        "attention": mla_weights(rng),
        "ffn_norm_D": 1.0 + normal(rng, WIDTH),
        "ffn": ffn(rng),
    }


def model_params(rng, depths=2):
    def mtp_weights():
        return {
            "embedding_norm_D": 1.0 + normal(rng, WIDTH),
            "hidden_norm_D": 1.0 + normal(rng, WIDTH),
            "w_proj_2DD": normal(rng, 2 * WIDTH, WIDTH),
            "block": block_weights(rng, moe_weights),
            "final_norm_D": 1.0 + normal(rng, WIDTH),
        }

    return {
        "embed_VD": normal(rng, VOCAB, WIDTH),
        "layers": [block_weights(rng, swiglu_weights), block_weights(rng, moe_weights)],
        "final_norm_D": 1.0 + normal(rng, WIDTH),
        "head_DV": normal(rng, WIDTH, VOCAB),
        "mtp": [mtp_weights() for _ in range(depths)],
    }


def run_model(params, tokens_BT, **packing):
    return transformer.forward(
        params, np.asarray(tokens_BT), attention=ATTENTION, moe=MOE, norm_eps=1e-6, **packing
    )


# ---- layers and rope ----


def test_rms_norm_and_swiglu_by_hand():
    np.testing.assert_allclose(
        layers.rms_norm([3.0, 4.0], [1.0, 2.0], 0.0), [0.848528, 2.262742], 1e-6
    )
    w_in_D2F = np.array([[1.0, 10.0]])  # gate 2, up 20
    out_D = layers.swiglu(np.array([2.0]), w_in_D2F, np.array([[0.5]]))
    np.testing.assert_allclose(out_D, [2.0 / (1.0 + math.exp(-2.0)) * 20.0 * 0.5])


def test_rope_turns_interleaved_pairs():
    frequencies_r = rope.rope_frequencies(4, 1e4)
    np.testing.assert_allclose(frequencies_r, [1.0, 0.01])
    out_R = rope.apply_rope(np.array([1.0, 0.0, 0.0, 1.0]), 50, frequencies_r)
    wanted = [math.cos(50.0), math.sin(50.0), -math.sin(0.5), math.cos(0.5)]
    np.testing.assert_allclose(out_R, wanted)


def test_rope_scores_depend_on_distance_alone():
    rng = np.random.default_rng(0)
    q_R, k_R = normal(rng, 8), normal(rng, 8)
    frequencies_r = rope.rope_frequencies(8, 1e4)
    near, far = (
        rope.apply_rope(q_R, 5 + shift, frequencies_r)
        @ rope.apply_rope(k_R, 2 + shift, frequencies_r)
        for shift in (0, 1000)
    )
    np.testing.assert_allclose(near, far, rtol=1e-10)


def test_yarn_leaves_fast_pairs_and_divides_slow_ones():
    plain_r = rope.rope_frequencies(64, 1e4)
    yarn_r = rope.yarn_frequencies(64, 1e4, factor=40.0, original_max_positions=4096)
    turns_r = 4096 * plain_r / (2.0 * math.pi)
    assert np.sum(turns_r > 32) == 11  # pairs 0 to 10
    assert np.sum(turns_r < 1) == 9  # pairs 23 to 31
    np.testing.assert_array_equal(yarn_r[:11], plain_r[:11])
    np.testing.assert_allclose(yarn_r[23:], plain_r[23:] / 40.0, rtol=1e-15)
    # V3's ramp runs from pair 10 to pair 23: pair 20 is 10/13 interpolated.
    np.testing.assert_allclose(yarn_r[20], plain_r[20] * (10 / 13 / 40 + 3 / 13))


def test_mscale_and_softmax_scale():
    np.testing.assert_allclose(rope.yarn_mscale(40.0), 1.3688879454, rtol=1e-10)
    np.testing.assert_allclose(rope.yarn_mscale(40.0, 0.707), 1.2608037774, rtol=1e-10)
    assert rope.yarn_mscale(1.0) == 1.0
    np.testing.assert_allclose(rope.softmax_scale(192), 0.0721687836, rtol=1e-9)
    np.testing.assert_allclose(rope.softmax_scale(192, YARN), 0.1352337788, rtol=1e-9)
    _, magnitude = rope.frequencies_and_magnitude(4, ATTENTION.rope)
    assert magnitude == 1.0


# ---- attention ----


@pytest.mark.parametrize("q_latent", [5, None])
def test_absorbed_equals_naive(q_latent):
    rng = np.random.default_rng(1)
    weights = mla_weights(rng, q_latent)
    x_BTD = normal(rng, 1, 7, WIDTH)
    segments_BT = np.array([[1, 1, 1, 2, 2, 2, 2]])
    positions_BT = np.array([[0, 1, 2, 0, 1, 2, 3]])
    naive_BTD = mla.mla(
        x_BTD, weights, ATTENTION, segments_BT=segments_BT, positions_BT=positions_BT
    )
    for start, stop in ((0, 3), (3, 7)):
        cache = []
        for t in range(start, stop):
            cache.append(mla.latent_entry(x_BTD[0, t], t - start, weights, ATTENTION))
            out_D = mla.mla_absorbed(x_BTD[0, t], t - start, cache, weights, ATTENTION)
            np.testing.assert_allclose(out_D, naive_BTD[0, t], rtol=1e-10, atol=1e-12)
        assert cache[0].shape == (LATENT + ATTENTION.rope_dim,)


def test_attention_of_equal_keys_is_a_mean_over_the_document():
    q_BTNA = np.zeros((1, 4, 1, 2))
    v_BTNH = np.array([1.0, 3.0, 10.0, 20.0]).reshape(1, 4, 1, 1)
    out_BTNH, lse_BTN = mla.attend(
        q_BTNA, q_BTNA, v_BTNH, np.array([[1, 1, 2, 2]]), np.array([[0, 1, 0, 1]]), 1.0
    )
    np.testing.assert_allclose(out_BTNH.ravel(), [1.0, 2.0, 10.0, 15.0])
    np.testing.assert_allclose(lse_BTN.ravel(), [0.0, math.log(2.0), 0.0, math.log(2.0)])


# ---- router ----


def logits_of(scores):
    scores = np.asarray(scores)
    return np.log(scores / (1.0 - scores))


def test_masked_groups_cannot_win_with_negative_biases():
    # s + b = [-0.4, -0.1 | -0.5, -0.3]: group 0 is kept (-0.5 > -0.8). Were experts 2 and 3 put
    # to 0 instead of -inf, both would beat the kept ones.
    gates_UK, expert_UK, scores_UE = router.route_v3(
        logits_of([[0.4, 0.6, 0.3, 0.5]]),
        np.array([-0.8, -0.7, -0.8, -0.8]),
        num_groups=2,
        groups_per_token=1,
        experts_per_token=2,
        scale=2.5,
    )
    np.testing.assert_allclose(scores_UE, [[0.4, 0.6, 0.3, 0.5]])
    np.testing.assert_array_equal(expert_UK, [[1, 0]])
    np.testing.assert_allclose(gates_UK, [[1.5, 1.0]])  # 0.6 and 0.4 of 1, times 2.5: no bias


def test_group_score_is_the_sum_of_two_not_the_maximum():
    sizes = {"num_groups": 2, "groups_per_token": 1, "experts_per_token": 1}
    logits_UE = logits_of([[0.9, 0.1, 0.7, 0.6]])
    _, expert_UK, _ = router.route_v3(logits_UE, np.zeros(4), scale=1.0, **sizes)
    assert expert_UK[0, 0] == 2
    _, expert_UK, _ = router.route_v2(logits_UE, scale=1.0, **sizes)
    assert expert_UK[0, 0] == 0


def test_v2_gates_are_raw_scores_times_scale_and_ties_go_low():
    logits_UE = np.log(np.array([[0.1, 0.4, 0.1, 0.4]]))
    gates_UK, expert_UK, _ = router.route_v2(
        logits_UE, num_groups=1, groups_per_token=1, experts_per_token=3, scale=16.0
    )
    np.testing.assert_array_equal(expert_UK, [[1, 3, 0]])
    np.testing.assert_allclose(gates_UK, [[6.4, 6.4, 1.6]])
    np.testing.assert_allclose(router.dense_gates(gates_UK, expert_UK, 4), [[1.6, 6.4, 0, 6.4]])


def test_load_counts_real_tokens():
    load_E = router.expert_load(np.array([[0, 1], [0, 2], [0, 3]]), np.array([1, 4, 0]), 4)
    np.testing.assert_array_equal(load_E, [2, 1, 1, 0])


def test_balance_loss_of_a_uniform_router_is_alpha():
    scores_BTE = np.full((2, 5, 4), 0.3)
    segments_BT = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    loss = router.balance_loss(scores_BTE, segments_BT, experts_per_token=2, alpha=1e-4)
    np.testing.assert_allclose(loss, 1e-4)


def test_balance_loss_by_hand():
    # Both real tokens choose expert 0: f = [4/2 * 2, 0, 0, 0]... E / (K T) = 4 / (1 * 2).
    scores_BTE = np.array([[[0.6, 0.2, 0.1, 0.1], [0.4, 0.2, 0.2, 0.0], [0.0, 0.0, 0.0, 1.0]]])
    segments_BT = np.array([[1, 2, 0]])
    loss = router.balance_loss(scores_BTE, segments_BT, experts_per_token=1, alpha=1.0)
    np.testing.assert_allclose(loss, 4.0 * (0.6 + 0.5) / 2)  # f_0 = 4, P_0 = 0.55
    twice = np.concatenate([scores_BTE, np.full((1, 3, 4), 0.5)])  # a second, uniform row: 1
    segments_BT = np.array([[1, 2, 0], [1, 1, 1]])
    loss = router.balance_loss(twice, segments_BT, experts_per_token=1, alpha=1.0)
    np.testing.assert_allclose(loss, (2.2 + 1.0) / 2)


def test_v2_balance_losses_by_hand():
    """Two tokens, four experts on two devices, two experts and at most one device a token."""
    scores_BTE = np.array([[[0.4, 0.3, 0.2, 0.1], [0.2, 0.2, 0.5, 0.1], [0.0, 0.0, 0.0, 1.0]]])
    sizes = {"num_groups": 2, "groups_per_token": 1}
    segments_BT = np.array([[1, 2, 0]])
    p_E = [0.3, 0.25, 0.35, 0.1]
    # One token on each device: every f is 4 / (2 * 2), 2 / (1 * 2) = 1, and the P sum to 1.
    expert_BTK = np.array([[[0, 1], [2, 3], [3, 0]]])
    even = router.v2_balance_losses(scores_BTE, expert_BTK, segments_BT, **sizes)
    np.testing.assert_allclose([even.expert, even.device, even.communication], 1.0)
    # Both tokens on device 0, once as 0, 1 and once as 0, 1: f = 2, 2, 0, 0; f' = 2, 0; f'' = 2, 0.
    expert_BTK = np.array([[[0, 1], [1, 0], [2, 3]]])
    uneven = router.v2_balance_losses(scores_BTE, expert_BTK, segments_BT, **sizes)
    np.testing.assert_allclose([uneven.expert, uneven.device, uneven.communication], 2 * 0.55)
    # Without a limit, 0 and 2 twice: uneven experts, each device half of the load and every token.
    sizes = {"num_groups": 2, "groups_per_token": 2}
    expert_BTK = np.array([[[0, 2], [0, 2], [3, 0]]])
    experts = router.v2_balance_losses(scores_BTE, expert_BTK, segments_BT, **sizes)
    np.testing.assert_allclose(experts.expert, 2 * (p_E[0] + p_E[2]))
    np.testing.assert_allclose([experts.device, experts.communication], 1.0)
    # 0, 1 and 0, 2: device 0 has three of four assignments and two of three arrivals.
    expert_BTK = np.array([[[0, 1], [0, 2], [3, 0]]])
    mixed = router.v2_balance_losses(scores_BTE, expert_BTK, segments_BT, **sizes)
    np.testing.assert_allclose(mixed.expert, 2 * p_E[0] + p_E[1] + p_E[2])
    np.testing.assert_allclose(mixed.device, 1.5 * 0.55 + 0.5 * 0.45)
    np.testing.assert_allclose(mixed.communication, 1.0 * 0.55 + 0.5 * 0.45)


def test_v2s_expert_balance_on_the_best_scores_is_v3s():
    rng = np.random.default_rng(6)
    scores_BTE = rng.random((3, 9, 8))
    segments_BT = (rng.random((3, 9)) < 0.7).astype(int)
    best_BTK = np.array([[router.top_k(s_E, 2) for s_E in s_TE] for s_TE in scores_BTE])
    share_BTE = scores_BTE / scores_BTE.sum(axis=-1, keepdims=True)
    got = router.v2_balance_losses(
        share_BTE, best_BTK, segments_BT, num_groups=4, groups_per_token=2
    )
    wanted = router.balance_loss(scores_BTE, segments_BT, experts_per_token=2, alpha=1.0)
    np.testing.assert_allclose(got.expert, wanted, rtol=1e-12)


def test_bias_update_and_max_violation():
    bias_E = router.update_bias(np.array([0.0, 0.5, 0.1, 0.0]), np.array([6, 4, 4, 2]), 0.001)
    np.testing.assert_allclose(bias_E, [-0.001, 0.5, 0.1, 0.001])
    assert router.max_violation(np.array([6, 4, 4, 2])) == 0.5


# ---- mixture of experts, model, MTP ----


def test_moe_with_equal_experts_is_one_expert_times_the_scale():
    rng = np.random.default_rng(2)
    one, weights = swiglu_weights(rng), moe_weights(rng)
    weights["w_in_ED2F"] = np.stack([one["w_in_D2F"]] * EXPERTS)
    weights["w_down_EFD"] = np.stack([one["w_down_FD"]] * EXPERTS)
    weights["shared"] = None
    x_BTD = normal(rng, 1, 3, WIDTH)
    out_BTD, aux = moe.moe_layer(x_BTD, weights, MOE, segments_BT=np.array([[1, 1, 0]]))
    for t in range(3):
        np.testing.assert_allclose(
            out_BTD[0, t], 2.5 * layers.swiglu(x_BTD[0, t], one["w_in_D2F"], one["w_down_FD"])
        )
    assert np.sum(aux.load_E) == 2 * 2  # two real tokens, two experts each


def test_packed_equals_unpacked_and_padding_counts_nowhere():
    params = model_params(np.random.default_rng(3))
    first, second = [1, 2, 3, 4], [5, 6, 7]
    packed = run_model(
        params,
        [[*first, *second, 0]],
        segments_BT=np.array([[1, 1, 1, 1, 2, 2, 2, 0]]),
        positions_BT=np.array([[0, 1, 2, 3, 0, 1, 2, 0]]),
    )
    alone = [run_model(params, [document]) for document in (first, second)]
    np.testing.assert_allclose(packed.logits_BTV[0, :4], alone[0].logits_BTV[0], rtol=1e-9)
    np.testing.assert_allclose(packed.logits_BTV[0, 4:7], alone[1].logits_BTV[0], rtol=1e-9)
    for k in range(2):
        parts = [output.mtp[k] for output in alone]
        np.testing.assert_array_equal(
            packed.mtp[k].aux.load_E, parts[0].aux.load_E + parts[1].aux.load_E
        )
        real_BT = packed.mtp[k].segments_BT != 0
        wanted = [p.hidden_BTD[p.segments_BT != 0] for p in parts]
        np.testing.assert_allclose(
            packed.mtp[k].hidden_BTD[real_BT], np.concatenate(wanted), rtol=1e-9
        )
    assert packed.aux[0] is None
    assert np.sum(packed.aux[1].load_E) == 2 * 7


def test_model_is_causal():
    params = model_params(np.random.default_rng(4), depths=1)
    a, b = (run_model(params, [[1, 2, 3, last]]) for last in (4, 5))
    np.testing.assert_array_equal(a.hidden_BTD[0, :3], b.hidden_BTD[0, :3])
    # Depth 1 reads one token further.
    np.testing.assert_array_equal(a.mtp[0].hidden_BTD[0, :2], b.mtp[0].hidden_BTD[0, :2])
    assert np.any(a.mtp[0].hidden_BTD[0, 2] != b.mtp[0].hidden_BTD[0, 2])


def test_mtp_positions_end_with_their_document():
    segments_BT = np.array([[1, 1, 1, 2, 2, 0, 0]])
    np.testing.assert_array_equal(mtp.depth_segments(segments_BT, 1), [[1, 1, 0, 2, 0, 0, 0]])
    np.testing.assert_array_equal(mtp.depth_segments(segments_BT, 2), [[1, 0, 0, 0, 0, 0, 0]])


def test_mtp_loss_is_a_mean_over_surviving_tokens_and_depths():
    # A head of zeros: each cross entropy is ln V, whatever the hidden state.
    segments_BT = np.array([[1, 1, 1, 1, 2, 2]])
    outputs = [
        SimpleNamespace(
            hidden_BTD=np.ones((1, 6, WIDTH)), segments_BT=mtp.depth_segments(segments_BT, k)
        )
        for k in (1, 2)
    ]
    targets_BT = np.zeros((1, 6), np.int64)
    weights_BT = np.array([[1.0, 1.0, 1.0, 0.0, 1.0, 0.0]])
    head_DV = np.zeros((WIDTH, VOCAB))
    loss, per_depth = mtp.mtp_loss(outputs, targets_BT, weights_BT, head_DV, mtp_weight=0.3)
    np.testing.assert_allclose(per_depth, [math.log(VOCAB)] * 2)
    np.testing.assert_allclose(loss, 0.3 * math.log(VOCAB))
    # Depth 1 predicts targets 1 and 2 (3 and 5 have weight 0), depth 2 target 2 alone.
    _, per_depth = mtp.mtp_loss(
        outputs, targets_BT, weights_BT, head_DV, mtp_weight=0.3, denominators=[1.0, 1.0]
    )
    np.testing.assert_allclose(per_depth, [2 * math.log(VOCAB), math.log(VOCAB)])


def test_mtp_targets_are_the_tokens_beyond_the_next():
    # A head that reads the target off the hidden state: only the right shift has loss 0.
    hidden_BTD = np.eye(VOCAB)[None, [3, 4, 5, 0]] * 100.0
    output = SimpleNamespace(hidden_BTD=hidden_BTD, segments_BT=np.array([[1, 1, 1, 0]]))
    tokens_and_next = np.array([1, 2, 3, 4, 5])  # t_1 .. t_5: position 0 predicts t_3
    targets_BT = tokens_and_next[None, 1:]
    loss, _ = mtp.mtp_loss([output], targets_BT, np.ones((1, 4)), np.eye(VOCAB), mtp_weight=1.0)
    assert loss < 1e-9


def test_losses_add_up():
    params = model_params(np.random.default_rng(5), depths=1)
    tokens_BT, targets_BT = np.array([[1, 2, 3, 4]]), np.array([[2, 3, 4, 0]])
    weights_BT = np.array([[1.0, 1.0, 1.0, 0.0]])
    output = run_model(params, tokens_BT)
    parts = transformer.losses(
        params, output, targets_BT, weights_BT, mtp_weight=0.3, balance_weights=(0.01, 0.02, 0.03)
    )
    wanted = [layers.cross_entropy(output.logits_BTV[0, t], targets_BT[0, t]) for t in range(3)]
    np.testing.assert_allclose(parts.main, np.mean(wanted))
    np.testing.assert_allclose(parts.mtp, 0.3 * parts.mtp_depths[0])
    told = output.aux[1].balance, output.mtp[0].aux.balance
    wanted = [
        0.01 * sum(balance.expert for balance in told),
        0.02 * sum(balance.device for balance in told),
        0.03 * sum(balance.communication for balance in told),
    ]
    np.testing.assert_allclose(parts.balance, wanted)
    np.testing.assert_allclose(parts.total, parts.main + parts.mtp + sum(wanted))


# ---- optimizer ----


def test_first_adamw_step_moves_by_the_sign():
    params = {"w": np.array([1.0, -2.0]), "norm": np.array([1.0])}
    zeros = {name: np.zeros_like(p) for name, p in params.items()}
    grads = {"w": np.array([3.0, 0.0]), "norm": np.array([-4.0])}  # norm 5, clipped to 1
    new, first, second, norm = optimizer.adamw_step(
        params, grads, zeros, zeros, 1, learning_rate=0.1, decayed={"w"}
    )
    assert norm == 5.0
    np.testing.assert_allclose(first["w"], [0.1 * 0.6, 0.0])
    np.testing.assert_allclose(second["norm"], [0.05 * 0.64])
    np.testing.assert_allclose(new["w"], [1.0 - 0.1 * (1.0 + 0.1), -2.0 + 0.1 * 0.1 * 2.0], 1e-7)
    np.testing.assert_allclose(new["norm"], [1.1], 1e-7)


@pytest.mark.parametrize(
    ("tokens", "wanted"),
    [
        (0.0, 0.0),
        (0.0125e12, 1.1e-4),
        (0.025e12, 2.2e-4),
        (5e12, 2.2e-4),
        (10e12, 2.2e-4),
        (12.15e12, (2.2e-4 + 2.2e-5) / 2),
        (14.2999999e12, 2.2e-5),
        (14.3e12, 2.2e-5),
        (14.63299e12, 2.2e-5),
        (14.633e12, 7.3e-6),
        (14.8e12, 7.3e-6),
    ],
)
def test_learning_rate_at_the_borders(tokens, wanted):
    rate = optimizer.v3_learning_rate(tokens / 14.8e12, warmup=0.025 / 14.8)
    np.testing.assert_allclose(rate, wanted, rtol=1e-9)


def test_other_schedules():
    assert optimizer.v3_mtp_weight(0.5) == 0.3
    assert optimizer.v3_mtp_weight(0.7) == 0.1
    assert optimizer.v3_bias_speed(0.9) == 1e-3
    assert optimizer.v3_bias_speed(0.97) == 0.0


# ---- golden files of transformers (tests/oracle/make_golden.py) ----

GOLDEN = pathlib.Path(__file__).parent / "golden"
FLOAT32_NOISE = (
    1e-5  # theirs is float32, ours float64: 5e-7 was measured between two of their paths
)


def load_golden(name):
    facts = json.loads((GOLDEN / f"{name}.json").read_text())
    return load_file(GOLDEN / f"{name}.safetensors"), facts


def assert_near(got, wanted):
    assert np.shape(got) == np.shape(wanted)
    assert np.linalg.norm(got - wanted) <= FLOAT32_NOISE * np.linalg.norm(wanted)


def yarn_of(scaling):
    if scaling is None:
        return None
    fields = {k: scaling[k] for k in vars(YARN) if k in scaling}
    return SimpleNamespace(
        **fields, original_max_positions=scaling["original_max_position_embeddings"]
    )


def attention_of(c):
    return SimpleNamespace(
        nope_dim=c["qk_nope_head_dim"],
        rope_dim=c["qk_rope_head_dim"],
        latent_norm_eps=1e-6,
        rope=SimpleNamespace(theta=c["rope_theta"], yarn=yarn_of(c["rope_scaling"])),
    )


def moe_of(c):
    return SimpleNamespace(
        num_experts_per_token=c["num_experts_per_tok"],
        num_groups=c["n_group"],
        groups_per_token=c["topk_group"],
        score=c["scoring_func"],
        gate_scale=c["routed_scaling_factor"],
        normalize_gates=c["norm_topk_prob"],
        balance_counts="best_scores" if c["topk_method"] == "noaux_tc" else "selected",
    )


def params_of(tensors, c):
    """From the published names ([out, in] matrices) to the layout of `tests.reference`."""
    heads = c["num_attention_heads"]

    def get(name):
        return tensors["param/" + name]

    def split_heads(name):  # [N * A, in] to [in, N, A]
        matrix = get(name)
        return matrix.reshape(heads, -1, matrix.shape[1]).transpose(2, 0, 1)

    def swiglu(prefix):
        gate, up = get(f"{prefix}.gate_proj.weight"), get(f"{prefix}.up_proj.weight")
        down_FD = get(f"{prefix}.down_proj.weight").T
        return {"w_in_D2F": np.concatenate([gate.T, up.T], axis=1), "w_down_FD": down_FD}

    def attention(prefix):
        if c["q_lora_rank"] is None:
            query = {"w_q_DNA": split_heads(f"{prefix}.q_proj.weight")}
        else:
            query = {
                "w_dq_DQ": get(f"{prefix}.q_a_proj.weight").T,
                "q_norm_Q": get(f"{prefix}.q_a_layernorm.weight"),
                "w_uq_QNA": split_heads(f"{prefix}.q_b_proj.weight"),
            }
        w_o = get(f"{prefix}.o_proj.weight").T
        return query | {
            "w_dkvr_DZ": get(f"{prefix}.kv_a_proj_with_mqa.weight").T,
            "kv_norm_C": get(f"{prefix}.kv_a_layernorm.weight"),
            "w_ukv_CNY": split_heads(f"{prefix}.kv_b_proj.weight"),
            "w_o_NHD": w_o.reshape(heads, -1, w_o.shape[1]),
        }

    def experts(prefix):
        each = [swiglu(f"{prefix}.experts.{e}") for e in range(c["n_routed_experts"])]
        bias = f"{prefix}.gate.e_score_correction_bias"
        return {
            "w_router_DE": get(f"{prefix}.gate.weight").T,
            "w_in_ED2F": np.stack([w["w_in_D2F"] for w in each]),
            "w_down_EFD": np.stack([w["w_down_FD"] for w in each]),
            "shared": swiglu(f"{prefix}.shared_experts"),
        } | ({"bias_E": get(bias)} if "param/" + bias in tensors else {})

    layers = []
    for i in range(c["num_hidden_layers"]):
        prefix = f"model.layers.{i}"
        ffn = swiglu if i < c["first_k_dense_replace"] else experts
        layers.append(
            {
                "attention_norm_D": get(f"{prefix}.input_layernorm.weight"),
                "attention": attention(f"{prefix}.self_attn"),
                "ffn_norm_D": get(f"{prefix}.post_attention_layernorm.weight"),
                "ffn": ffn(f"{prefix}.mlp"),
            }
        )
    return {
        "embed_VD": get("model.embed_tokens.weight"),
        "layers": layers,
        "final_norm_D": get("model.norm.weight"),
        "head_DV": get("lm_head.weight").T,
    }


@pytest.mark.parametrize(
    "name", ["deepseek_v3", "deepseek_v3_plain", "deepseek_v2", "deepseek_v2_lite"]
)
def test_model_agrees_with_transformers(name):
    tensors, facts = load_golden(name)
    c = facts["config_published"]
    params, moe_settings = params_of(tensors, c), moe_of(c)
    tokens_BT = tensors["input_ids"]
    output = transformer.forward(
        params,
        tokens_BT,
        attention=attention_of(c),
        moe=moe_settings,
        norm_eps=c["rms_norm_eps"],
    )
    for got, wanted in zip(output.layers, tensors["layers"], strict=True):
        assert_near(got, wanted)
    assert_near(output.hidden_BTD, tensors["hidden"])
    assert_near(output.logits_BTV, tensors["logits"])
    routed = [aux for aux in output.aux if aux is not None]
    for i, aux in enumerate(routed):
        order_BTK = np.argsort(aux.expert_BTK, axis=-1)
        expert_BTK = np.take_along_axis(aux.expert_BTK, order_BTK, axis=-1)
        gates_BTK = np.take_along_axis(aux.gates_BTK, order_BTK, axis=-1)
        np.testing.assert_array_equal(expert_BTK, tensors["router/indices"][i])
        assert_near(gates_BTK, tensors["router/gates"][i])
    weights_BT = np.ones(tokens_BT.shape)
    weights_BT[:, -1] = 0.0
    loss = transformer.losses(params, output, np.roll(tokens_BT, -1, axis=1), weights_BT).main
    np.testing.assert_allclose(loss, tensors["loss"].item(), rtol=FLOAT32_NOISE)


@pytest.mark.parametrize("name", ["v2", "v3", "uneven"])
def test_yarn_agrees_with_transformers(name):
    tensors, facts = load_golden("yarn")
    c = facts["facts"][name]["config_published"]
    settings = attention_of(c)
    frequencies_r, magnitude = rope.frequencies_and_magnitude(settings.rope_dim, settings.rope)
    np.testing.assert_allclose(frequencies_r, tensors[f"{name}/inv_freq"], rtol=1e-6)
    np.testing.assert_allclose(magnitude, tensors[f"{name}/attention_scaling"][0], rtol=1e-6)
    scale = rope.softmax_scale(settings.nope_dim + settings.rope_dim, settings.rope.yarn)
    np.testing.assert_allclose(scale, tensors[f"{name}/softmax_scale"][0], rtol=1e-6)
    for i, position in enumerate(tensors["positions"]):
        for pair in range(settings.rope_dim // 2):
            x_R = np.zeros(settings.rope_dim)
            x_R[2 * pair] = 1.0
            out_R = rope.apply_rope(x_R, position, frequencies_r, magnitude)
            wanted = [tensors[f"{name}/{part}_exact"][i, pair] for part in ("cos", "sin")]
            np.testing.assert_allclose(out_R[2 * pair : 2 * pair + 2], wanted, atol=1e-6)
