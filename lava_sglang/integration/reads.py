# SPDX-License-Identifier: Apache-2.0
"""What we read or set of SGLang 0.5.23's objects, beside the callables of `seams.py`.

`tests/contract/test_reads.py` finds every such attribute in our sources and in SGLang's. A start
checks the callables only: SGLang's version is pinned, and to parse these classes takes a second.
"""

from __future__ import annotations

READS: dict[str, tuple[str, ...]] = {
    "srt.managers.schedule_batch.Req": (
        *("rid", "kv", "lock", "last_node", "extra_key", "cache_salt", "sampling_params"),
        *("origin_input_ids", "output_ids", "full_untruncated_fill_ids", "refresh_fill_ids"),
        *("prefix_len", "extend_end", "extend_len", "skip_radix_cache_insert"),
        *("to_finish", "finished", "beam_group", "session", "input_embeds"),
        *("positional_embed_overrides", "return_routed_experts", "return_indexer_topk"),
        *("session_generation",),
    ),
    "srt.managers.schedule_batch.ReqKvInfo": (
        *("req_pool_idx", "kv_committed_len", "kv_allocated_len", "cache_protected_len"),
    ),
    "srt.sampling.sampling_params.SamplingParams": (
        *("custom_params", "max_new_tokens", "n", "ignore_eos"),
    ),
    "srt.managers.schedule_batch.ScheduleBatch": (
        *("reqs", "batch_is_full", "forward_mode", "new_tokens_required_next_decode"),
        *("req_pool_indices_cpu", "seq_lens", "seq_lens_cpu", "seq_lens_sum"),
    ),
    "srt.managers.scheduler.Scheduler": (
        *("chunked_req", "device", "device_module", "enable_overlap", "forward_stream"),
        *("schedule_stream", "new_token_ratio_tracker", "page_size", "prefill_decode_interval"),
        *("running_batch", "waiting_queue", "token_to_kv_pool_allocator", "tp_worker"),
        *("tree_cache", "metrics_reporter", "metrics_collector"),
    ),
    "srt.managers.schedule_policy.PrefillAdder": (
        *("memory_budget", "running_batch", "tree_cache", "token_to_kv_pool_allocator"),
        *("can_run_list", "rem_chunk_tokens", "chunked_req_limit", "req_states"),
        *("per_req_token_overhead",),
    ),
    "srt.mem_cache.prefill_budget.PrefillBudget": (
        *("allocator", "tree_cache", "page_size", "remaining_current", "remaining_total"),
        *("current_offset", "total_offset"),
    ),
    "srt.mem_cache.base_prefix_cache.BasePrefixCache": (
        *("disable", "page_size", "evictable_size", "protected_size", "req_to_token_pool"),
        *("token_to_kv_pool_allocator",),
    ),
    "srt.mem_cache.unified_radix_cache.UnifiedRadixCache": ("tree_core",),
    "srt.mem_cache.allocator.base.BaseTokenToKVPoolAllocator": (
        *("size", "page_size", "available_size", "get_kvcache"),
    ),
    "srt.mem_cache.memory_pool.ReqToTokenPool": ("req_to_token", "size"),
    "srt.mem_cache.memory_pool.MHATokenToKVPool": (
        *("layer_num", "head_num", "head_dim", "v_head_dim", "kv_cache_layout", "page_size"),
        *("store_dtype", "device", "memory_saver_adapter", "enable_custom_mem_pool"),
        *("custom_mem_pool", "get_key_buffer", "get_value_buffer", "dtype"),
    ),
    "srt.mem_cache.kv_cache_configurator.KVCacheConfigurator": (
        *("device", "layer_info", "model_config", "kv_cache_dtype"),
    ),
    "srt.model_executor.pool_configurator.DefaultPoolConfigurator": ("_fixed_overhead_bytes",),
    "srt.model_executor.model_runner.ModelRunner": (
        *("attn_backend", "device", "model", "model_config", "req_to_token_pool"),
        *("token_to_kv_pool",),
    ),
    "srt.model_executor.forward_batch_info.ForwardBatch": (
        *("extend_prefix_lens_cpu", "extend_seq_lens_cpu", "forward_mode", "positions"),
        *("req_pool_indices", "req_pool_indices_cpu", "seq_lens", "seq_lens_cpu"),
    ),
    "srt.layers.radix_attention.RadixAttention": (
        *("attn_type", "is_cross_attention", "layer_id", "logit_cap", "qk_head_dim", "scaling"),
        *("sliding_window_size", "tp_q_head_num", "v_head_dim", "k_scale", "v_scale"),
        *("k_scale_float", "v_scale_float", "logit_capping_method", "xai_temperature_len"),
    ),
    "srt.layers.attention.hybrid_attn_backend.HybridAttnBackend": (
        *("prefill_backend", "decode_backend"),
    ),
}
"""Dotted path of a class below sglang -> names that it has: stored on `self`, or in its body."""
