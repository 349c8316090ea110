# SPDX-License-Identifier: Apache-2.0
"""Every callable of SGLang 0.5.23 that we replace, hook, override or call, with the parameters we
count on. What we read of its objects is in `reads.py`.

`refusals.seam_reasons` compares them with the installed SGLang before a server starts.
"""

from __future__ import annotations

from typing import NamedTuple


class Seam(NamedTuple):
    target: str  # dotted path below sglang
    how: str  # replace, hook, override or call
    parameters: tuple[str, ...]  # of the callable, in order
    why: str


_SCHEDULER = "srt.managers.scheduler.Scheduler"
_REQ = "srt.managers.schedule_batch.Req"
_ADDER = "srt.managers.schedule_policy.PrefillAdder"
_STREAMER = "srt.managers.scheduler_components.output_streamer.SchedulerOutputStreamer"
_STATS = "srt.managers.scheduler_components.pool_stats_observer.PoolStats"
_BACKEND = "srt.layers.attention.base_attn_backend.AttentionBackend"
_CPU_BACKEND = "srt.layers.attention.torch_native_backend.TorchNativeAttnBackend"
_POOL = "srt.mem_cache.memory_pool.MHATokenToKVPool"
_BUDGET = "srt.mem_cache.prefill_budget.PrefillBudget"
_TREE = "srt.mem_cache.base_prefix_cache.BasePrefixCache"

SERVER_ARGS = Seam(
    "srt.server_args._rebuild_server_args",
    "replace",
    ("cls", "fields", "bookkeeping"),
    "ServerArgs is sealed when imported: only a class in its place can add options",
)
VALIDATE = Seam(
    "srt.arg_groups.serving_hook.handle_other_validations",
    "hook",
    ("server_args",),
    "resolution hook: settings and features are checked before a process starts",
)
META_INFO = Seam(
    "srt.managers.tokenizer_manager.TokenizerManager._accumulate_request_meta_info",
    "hook",
    ("meta_info", "state", "key", "values"),
    "SGLang accumulates a list per key; ours is one object. No subclass point in 0.5.23",
)
GENERATE_CHECK = Seam(
    "srt.entrypoints.api_contract.generate_contract_error",
    "hook",
    ("body",),
    "the one check of a /generate body before its answer begins",
)
COMPLETION_CHECK = Seam(
    "srt.entrypoints.openai.serving_completions.OpenAIServingCompletion._validate_request",
    "hook",
    ("self", "request"),
    "the same for a route of OpenAI's; SGLang builds these objects itself",
)
CHAT_CHECK = Seam(
    "srt.entrypoints.openai.serving_chat.OpenAIServingChat._validate_request",
    "hook",
    ("self", "request"),
    "the same",
)
_HANDLER = ("self", "request", "raw_request")
_NO_SETTINGS = "a protocol without custom parameters: SGLang drops what it does not know"
ANTHROPIC = Seam(
    "srt.entrypoints.anthropic.serving.AnthropicServing.handle_messages",
    "hook",
    _HANDLER,
    _NO_SETTINGS,
)
OLLAMA_CHAT = Seam(
    "srt.entrypoints.ollama.serving.OllamaServing.handle_chat", "hook", _HANDLER, _NO_SETTINGS
)
OLLAMA_GENERATE = Seam(
    "srt.entrypoints.ollama.serving.OllamaServing.handle_generate", "hook", _HANDLER, _NO_SETTINGS
)
RESPONSES = Seam(
    "srt.entrypoints.openai.serving_responses.OpenAIServingResponses.create_responses",
    "hook",
    _HANDLER,
    _NO_SETTINGS,
)
ATTENTION = Seam(
    "srt.layers.attention.attention_registry.attn_backend_wrapper",
    "hook",
    ("runner", "full_attn_backend"),
    "the one place every backend passes; a registered name would replace the user's choice",
)
BACKEND = Seam(
    "srt.arg_groups.attention_hook.handle_attention_backend_compatibility",
    "hook",
    ("server_args",),
    "resolution hook: a ragged method decodes on our backend, whatever prefills",
)
POOL = Seam(
    "srt.platforms.interface.SRTPlatform.get_kv_pool_cls",
    "hook",
    ("self", "kind"),
    "SGLang's own seam for another pool; a platform subclass would take the place of the user's",
)
CONFIGURE = Seam(
    "srt.mem_cache.kv_cache_configurator.KVCacheConfigurator.configure",
    "hook",
    ("self", "pre_model_load_memory"),
    "on a CPU only: its check that eight-bit entries have AMX stands alone at its head",
)
QUANT_METHOD = Seam(
    "srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._build_mha_quant_method",
    "hook",
    ("self", "num_layers"),
    "on a CPU only: eight-bit entries without AMX's layout",
)
CELL_SIZE = Seam(
    "srt.model_executor.pool_configurator.DefaultPoolConfigurator._compute_cell_size",
    "hook",
    ("self", "kvc", "num_layers"),
    "bytes of a slot: a ladder's scores come out of the pool's memory, no subclass point",
)
POOL_SIZE = Seam(
    "srt.model_executor.pool_configurator.DefaultPoolConfigurator.__init__",
    "hook",
    ("self", "kvc"),
    "bytes beside the pool: our workspace and tables come out of its memory, no subclass point",
)
POSITIONS = Seam(
    "srt.model_executor.forward_batch_info.ForwardBatch.init_new",
    "hook",
    (
        "batch",
        "model_runner",
        "capture_hidden_mode",
        "return_hidden_states_before_norm",
        "extend_position_info",
        "spec_mrope_positions",
        "kv_loc_plan",
        "write_cols",
    ),
    "decode positions are derived from seq_lens here and nowhere else; no subclass point. It is "
    "handed the rows on the host and drops them in decode: FlashInfer is planned by them",
)
MROPE = Seam(
    "srt.model_executor.forward_batch_info.ForwardBatch._compute_mrope_positions_decode",
    "hook",
    ("self", "model_runner", "batch"),
    "the three positions of multimodal models are derived from lengths too, and from what a "
    "request's images took: SGLang's own arithmetic, over true lengths",
)
PREFILL_LOG = Seam(
    f"{_STATS}.get_prefill_usage_msg_parts", "hook", ("self",), "the Prefill batch log line"
)
DECODE_LOG = Seam(
    f"{_STATS}.get_decode_usage_msg_parts", "hook", ("self",), "the Decode batch log line"
)

SEAMS = (
    SERVER_ARGS,
    VALIDATE,
    BACKEND,
    META_INFO,
    GENERATE_CHECK,
    COMPLETION_CHECK,
    CHAT_CHECK,
    ANTHROPIC,
    OLLAMA_CHAT,
    OLLAMA_GENERATE,
    RESPONSES,
    POOL,
    CONFIGURE,
    QUANT_METHOD,
    CELL_SIZE,
    POOL_SIZE,
    ATTENTION,
    POSITIONS,
    MROPE,
    PREFILL_LOG,
    DECODE_LOG,
    Seam(
        "srt.server_args.ServerArgs.__reduce__",
        "override",
        ("self",),
        "unpickling the arguments in a child process installs the plugin there, or fails",
    ),
    Seam(
        f"{_POOL}._create_buffers_normal",
        "override",
        ("self",),
        "the buffers are views of one arena: the one place where they are allocated",
    ),
    Seam(f"{_POOL}._kv_buffer_shapes", "call", ("self",), "the shapes of those buffers"),
    Seam(
        f"{_POOL}.set_kv_buffer",
        "call",
        (
            "self",
            "layer",
            "loc_info",
            "cache_k",
            "cache_v",
            "k_scale",
            "v_scale",
            "layer_id_override",
            "dcp_kv_mask",
        ),
        "writes a layer's new entries",
    ),
    Seam(
        "srt.mem_cache.memory_pool.KVWriteLoc.for_batch",
        "call",
        ("forward_batch", "swa_loc", "full_loc"),
        "where a batch's new entries go",
    ),
    Seam(
        f"{_BACKEND}.forward_decode",
        "override",
        ("self", "q", "k", "v", "layer", "forward_batch", "save_kv_cache", "kwargs"),
        "each head reads its own entries",
    ),
    Seam(
        f"{_BACKEND}.init_forward_metadata",
        "override",
        ("self", "forward_batch"),
        "plans FlashInfer's calls; the Triton kernel needs no plan",
    ),
    Seam(
        f"{_BACKEND}.init_forward_metadata_out_graph",
        "override",
        ("self", "forward_batch", "in_capture"),
        "plans nothing",
    ),
    Seam(
        f"{_BACKEND}.init_cuda_graph_state",
        "override",
        ("self", "max_bs", "max_num_tokens"),
        "the Triton kernel's workspace is there already; FlashInfer has no graph",
    ),
    Seam(
        f"{_BACKEND}.get_cuda_graph_seq_len_fill_value",
        "override",
        ("self",),
        "the length of padding requests",
    ),
    Seam(
        f"{_BACKEND}.shared_read_ends",
        "override",
        ("self", "fm"),
        "when the scheduler may write rows again",
    ),
    Seam(
        f"{_CPU_BACKEND}.forward_decode",
        "override",
        ("self", "q", "k", "v", "layer", "forward_batch", "save_kv_cache"),
        "each head reads its own entries",
    ),
    Seam(
        f"{_CPU_BACKEND}.forward_extend",
        "override",
        ("self", "q", "k", "v", "layer", "forward_batch", "save_kv_cache"),
        "a chunk does not compute its prefix's attention again",
    ),
    Seam(
        f"{_BACKEND}.forward_extend",
        "override",
        ("self", "q", "k", "v", "layer", "forward_batch", "save_kv_cache", "kwargs"),
        "the window's queries, after RoPE and after the layer's entries are written",
    ),
    Seam(f"{_SCHEDULER}.__init__", "replace", ("self", "server_args", "port_args"), "the class"),
    Seam(
        f"{_SCHEDULER}.run_batch",
        "override",
        ("self", "batch", "pp_proxy_tensors"),
        "compression happens when a forward pass has been launched",
    ),
    Seam(
        f"{_SCHEDULER}._create_generation_req",
        "override",
        ("self", "recv_req", "args", "kwargs"),
        "SGLang's extension point for request-local state",
    ),
    Seam(f"{_SCHEDULER}.get_prefill_adder_class", "override", ("self",), "extension point"),
    Seam(f"{_SCHEDULER}.get_output_streamer_class", "override", ("self",), "extension point"),
    Seam(f"{_SCHEDULER}.get_internal_state", "override", ("self", "recv_req"), "/server_info"),
    Seam(f"{_SCHEDULER}.on_idle", "override", ("self",), "gauges go back to zero"),
    Seam("srt.runtime_context.get_parallel", "call", (), "this process's ranks and replica"),
    Seam("srt.runtime_context.get_schedule", "call", (), "how many requests may run"),
    Seam(
        "srt.utils.common.get_cuda_graph_max_batch_size",
        "call",
        ("max_batch_size",),
        "captured batches are padded past that number",
    ),
    Seam(
        "srt.utils.common.get_eager_max_batch_size",
        "call",
        ("max_batch_size",),
        "and so are batches without a graph",
    ),
    Seam(
        f"{_REQ}._compute_max_prefix_len",
        "override",
        ("self", "input_len"),
        "leaves the observation window to be prefilled",
    ),
    Seam(f"{_REQ}.reset_for_retract", "override", ("self",), "forgets the private copy"),
    Seam(
        f"{_REQ}.set_finish_with_abort",
        "override",
        ("self", "error_msg", "status_code", "err_type"),
        "refuses a request with bad settings, and keeps that reason where later checks fail",
    ),
    Seam(
        f"{_SCHEDULER}.update_running_batch",
        "override",
        ("self", "batch"),
        "requests shrink before SGLang retracts any",
    ),
    Seam(
        f"{_REQ}.init_next_round_input",
        "override",
        ("self", "tree_cache", "cow_mamba"),
        "how far others use the prompt, before it is matched",
    ),
    Seam(
        f"{_ADDER}.add_one_req",
        "override",
        ("self", "req", "has_chunked_req", "truncation_align_size"),
        "running requests shrink for one that does not fit",
    ),
    Seam(f"{_ADDER}.add_chunked_req", "override", ("self", "req"), "the same for its next chunk"),
    Seam(
        f"{_ADDER}._commit_prefill_admission",
        "override",
        ("self", "req", "admission", "mamba_gap_reserve"),
        "counts what the end of this pass releases",
    ),
    Seam(
        f"{_ADDER}._swa_new_tokens", "call", ("self", "req"), "new tokens that admission plans for"
    ),
    Seam(
        f"{_BUDGET}.check_prefill",
        "override",
        (
            "self",
            "extend_input_len",
            "total_tokens",
            "max_new_tokens",
            "input_tokens",
            "swa_host_hit_length",
            "chunk_limit",
            "auxiliary_swa_host_hit_length",
        ),
        "prompt and answer are checked at two moments",
    ),
    Seam(
        f"{_BUDGET}.can_allocate_prefill",
        "override",
        ("self", "paged_input", "extend_input_len", "max_new_tokens", "chunk_limit"),
        "the last chunk needs its copy now, not later",
    ),
    Seam(
        f"{_BUDGET}.available_chunk_tokens",
        "override",
        ("self", "chunk_limit"),
        "a chunk that finds no slots waits; SGLang takes them unchecked",
    ),
    Seam(
        f"{_BUDGET}.has_capacity",
        "override",
        ("self",),
        "slots that this pass is certain to release let it go on",
    ),
    Seam(
        f"{_ADDER}._lock_node",
        "call",
        ("self", "last_node", "lock_host"),
        "room is not made of what the candidate has matched",
    ),
    Seam(
        "srt.mem_cache.common.match_kv_cache",
        "call",
        ("req", "tree_cache", "token_ids", "cow_mamba", "max_prefix_len"),
        "lets a candidate's match go where it is in the way",
    ),
    Seam(
        f"{_BUDGET}.__init__",
        "call",
        ("self", "allocator", "tree_cache", "num_mixed_decode_tokens"),
        "the budget in the place of the stock one",
    ),
    Seam(
        "srt.mem_cache.unified_cache.unified_tree_core_interface.UnifiedTreeCoreInterface"
        ".collect_path_info",
        "call",
        ("self", "end_node_ids"),
        "the branches on a text's path through the tree",
    ),
    Seam(
        "srt.mem_cache.unified_cache.unified_tree_core_interface.UnifiedTreeCoreInterface"
        ".match_full_device_prefix",
        "call",
        ("self", "key"),
        "where a text leaves the tree; `match_prefix` would split the node there",
    ),
    Seam(
        f"{_ADDER}._request_slot_reserve_for_req",
        "override",
        ("self", "req", "extend_input_len"),
        "keeps room for the copy; the allocator's own method does not see the request",
    ),
    Seam(f"{_ADDER}.ceil_paged_tokens", "call", ("self", "tokens"), "rounds to pages"),
    Seam(
        f"{_STREAMER}.build_additional_customized_info",
        "override",
        ("self", "reqs"),
        "extension point",
    ),
    Seam(
        f"{_STREAMER}.is_request_level_customized_info_key",
        "override",
        ("self", "key"),
        "extension point",
    ),
    Seam("srt.mem_cache.common.checkpoint_kv_cache", "call", ("req", "tree_cache"), "to the tree"),
    Seam(
        "srt.mem_cache.common.evict_from_tree_cache",
        "call",
        ("tree_cache", "num_tokens"),
        "makes room for the copy",
    ),
    Seam(f"{_TREE}.free_kv_row", "call", ("self", "kv", "ranges"), "frees the unaligned tail"),
    Seam(f"{_TREE}.match_prefix", "call", ("self", "params"), "finds the shared prefix's node"),
    Seam(f"{_TREE}.lock", "call", ("self", "node"), "locks the shared prefix only"),
    Seam(f"{_TREE}.unlock", "call", ("self", "lock"), "unlocks the exact suffix"),
    Seam(
        "srt.mem_cache.unified_radix_cache.UnifiedRadixCache.session_records",
        "call",
        ("self",),
        "slots that streaming sessions hold between their turns",
    ),
    Seam(f"{_TREE}.protected_size", "call", ("self",), "what a lock alone keeps"),
    Seam(
        "srt.mem_cache.memory_pool.ReqToTokenPool.register_on_alloc_rows",
        "call",
        ("self", "hook"),
        "the one place where a row gets an owner, of a prefill or without one: its tape is reset",
    ),
    Seam(
        "srt.mem_cache.memory_pool.ReqToTokenPool.write",
        "call",
        ("self", "indices", "values"),
        "puts the private slots into the row",
    ),
    Seam(
        "srt.mem_cache.allocator.base.BaseTokenToKVPoolAllocator.alloc",
        "call",
        ("self", "need_size"),
        "takes b slots",
    ),
)
