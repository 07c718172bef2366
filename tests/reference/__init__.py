"""The slow oracle: NumPy float64, written in loops from the papers' equations.

The equations' files import nothing of dsjax and no JAX. Arrays end in their dims
(docs/notation.md):

    B sequences   T queries     S keys        U tokens (B*T)   V vocabulary    M MTP depths
    D model       N heads       A = P + R     Y = P + H        Z = C + R       r = R / 2
    C kv latent   Q q latent    P nope        R rope           H value         I kv heads
    E experts     K per token   J groups      F FFN hidden

Weights are nested dicts of arrays, in the published fused layout:

    mla      w_dq_DQ q_norm_Q w_uq_QNA, or w_q_DNA; w_dkvr_DZ kv_norm_C w_ukv_CNY w_o_NHD
    gqa      w_q_DNA w_k_DIA w_v_DIH w_o_NHD, and b_q_NA b_k_IA b_v_IH, b_o_D where there are biases
    swiglu   w_in_D2F (gate first, then up) w_down_FD
    moe      w_router_DE bias_E (sigmoid router) w_in_ED2F w_down_EFD, shared: swiglu or absent
    block    attention_norm_D attention: mla or gqa, ffn_norm_D ffn: swiglu or moe
    mtp      embedding_norm_D hidden_norm_D w_proj_2DD block final_norm_D
    model    embed_VD layers: [block] final_norm_D head_DV (absent if tied) mtp: [mtp] or absent

Settings are any objects with these fields (SimpleNamespace, or dsjax.config's own classes):

    attention   rope, and for MLA nope_dim rope_dim latent_norm_eps
    rope        theta yarn (None, or factor original_max_positions beta_fast beta_slow mscale
                mscale_all_dim), or llama3 (factor original_max_positions low_freq_factor
                high_freq_factor), or linear_factor
    moe         num_experts_per_token num_groups groups_per_token score ("sigmoid" is V3's router,
                "softmax" V2's) gate_scale normalize_gates (V3 True, V2 False)
                balance_counts ("best_scores" V3's, "selected" V2's)

Segment 0 is padding. Values at padding positions mean nothing: compare real positions only. The
choice of experts is ordered by falling score; compare choices as sets (`router.dense_gates`).

Papers: V2 = arXiv 2405.04434, V3 = arXiv 2412.19437, YaRN = arXiv 2309.00071.
"""
