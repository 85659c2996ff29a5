"""`docs/hazards.md`: what can go wrong with an ONNX file and its numbers, and the test of each."""

from __future__ import annotations

import ast
from pathlib import Path

TESTS = Path(__file__).parent

_TEXT = """# Hazards of ONNX files and their numbers

What exporters, runtimes and files are known to do, what surgery does about it, and the tests that
hold it to that. This file is written from `tests/hazards.py` by `pytest tests/contracts
--update-golden`; a test fails where it is not what that says, or names a test that is not there.

| what happens | what surgery does | tests |
|---|---|---|
{rows}
"""

HAZARDS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        "External data points out of the model's folder: `..`, an absolute path, a symbolic or "
        "hard link; its range lies past the end of the file, or is negative; the file is missing.",
        "Refused in one line before any runtime sees it, by our own check of ranges and by "
        "onnx.checker and ONNX Runtime each; whichever refuses is enough.",
        (
            "export/test_onnxfile.py::test_bad_external_data_is_refused",
            "export/test_onnxfile.py::test_external_data_hidden_in_sparse_and_nested_tensors_is_found",
            "export/test_onnxfile.py::test_all_three_readers_must_accept_a_file",
            "differential/test_defects.py::test_truncated_external_data_is_bad_input_and_not_a_verdict",
        ),
    ),
    (
        "A file that is empty, cut short or garbage; unknown operators, domains and opsets; "
        "initializers given twice, outputs that nothing makes, cycles.",
        "Refused in one line that names the node, domain or value.",
        (
            "export/test_onnxfile.py::test_empty_garbage_and_truncated_files",
            "export/test_onnxfile.py::test_a_broken_graph_is_refused_with_its_reason",
            "runtimes/test_child.py::test_a_bad_file_is_bad_input_not_a_finding",
        ),
    ),
    (
        "A graph that loads and then never ends, asks for terabytes, or crashes its runtime.",
        "It runs in a child with limits on time and memory; the end of the child is a finding, the "
        "other corners go on.",
        (
            "runtimes/test_child.py::test_an_infinite_loop_is_killed_at_the_time_limit",
            "runtimes/test_child.py::test_an_allocation_of_4_tib_fails_in_the_child_alone",
            "runtimes/test_child.py::test_a_native_crash_of_a_runtime_is_recorded",
            "differential/test_defects.py::test_a_run_that_hangs_or_wants_4_tib_ends_and_is_a_finding",
            "differential/test_outcomes.py::test_a_corner_or_a_reference_that_does_not_end_well_fails",
            "test_process.py::test_a_child_dies_with_its_parent",
        ),
    ),
    (
        "A protobuf may not be larger than 2 GiB.",
        "A portable export keeps every weight in external data, however small; a larger file is "
        "refused unread.",
        (
            "export/test_write.py::test_the_graph_holds_standard_operators_and_no_weights",
            "export/test_onnxfile.py::test_a_file_over_2_gib_is_not_read",
        ),
    ),
    (
        "NaN, for which every comparison with a limit is false.",
        "A limit holds only where `value <= limit` is true; NaN at a real position is a finding of "
        "its own.",
        (
            "differential/test_defects.py::test_nan_is_a_finding_at_its_first_batch",
            "gate/test_verdict.py::test_no_policy_lets_nan_pass",
        ),
    ),
    (
        "An output is missing, or has another shape or type; nothing is compared at all.",
        "Each is a finding; without a comparison there is no pass.",
        (
            "differential/test_defects.py::test_another_interface_is_a_finding_that_names_the_output",
            "differential/test_defects.py::test_a_missing_cache_output_is_a_finding",
            "differential/test_outcomes.py::test_nothing_compared_is_no_pass",
            "gate/test_verdict.py::test_a_missing_corner_fails",
        ),
    ),
    (
        "Rows that may attend to nothing are 0 in fused kernels and NaN where the mask is minus "
        "infinity; a NaN under padding spreads to real rows, also in a float64 reference.",
        "The reference computes in float64 throughout, which keeps the mask finite. A row of "
        "nothing but padding is not judged, its neighbours are.",
        (
            "export/test_families.py::test_the_reference_survives_padding_on_every_family",
            "export/test_families.py::test_a_float32_softmax_is_what_padding_would_make_nan",
            "differential/test_padding.py::test_nan_that_a_masked_row_spreads_is_a_finding",
            "differential/test_padding.py::test_nan_in_a_masked_row_alone_is_none",
        ),
    ),
    (
        "The shape that was traced is baked in: a batch, a length, a mask taken for one kind of "
        "padding, a cache.",
        "Probes have other shapes than any trace, one row, one token, padding on either side and "
        "between tokens, long rows, the last positions, and caches from one token to a long one.",
        (
            "stimuli/test_batches.py::test_probes_have_the_shapes_a_trace_bakes_in",
            "differential/test_defects.py::test_a_graph_that_cannot_run_every_shape_is_a_finding",
            "differential/test_defects.py::test_an_ignored_mask_is_worst_where_there_is_padding",
            "differential/test_padding.py::test_a_mask_without_its_holes_is_seen_there",
            "differential/test_caches.py::test_a_cache_read_wrongly_is_seen_in_the_logits",
        ),
    ),
    (
        "Exporters keep one of several equal initializers.",
        "Lineage names every tensor that an initializer equals; where they are not equal any more, "
        "the outputs show it.",
        (
            "export/test_lineage.py::test_equal_tensors_are_all_named",
            "differential/test_hazards.py::"
            "test_one_initializer_of_two_equal_tensors_passes_and_of_two_unlike_ones_fails",
        ),
    ),
    (
        "Conversion to float16 clamps large numbers without a word.",
        "Our export refuses a finite weight that float16 cannot hold; in another exporter's file "
        "lineage and the embedding rows name it.",
        (
            "export/test_bind.py::test_float16_refuses_what_it_cannot_hold",
            "export/test_write.py::test_a_number_that_does_not_fit_float16_leaves_nothing",
            "differential/test_hazards.py::test_a_number_that_float16_cannot_hold_is_not_clamped_unseen",
        ),
    ),
    (
        "Another number of threads, or another run, changes the last bits.",
        "Errors are judged in units of float32 noise measured in the same run. Only CPUs are "
        "tested, so there is no TF32.",
        (
            "differential/test_hazards.py::"
            "test_the_verdict_does_not_depend_on_the_number_of_threads",
            "runtimes/test_child.py::test_the_number_of_threads_follows_the_environment",
        ),
    ),
    (
        "A damaged embedding row of a token that no input uses.",
        "Every row is looked up through the graph cut after the embedding.",
        (
            "differential/test_defects.py::test_a_zeroed_embedding_row_of_an_unused_token_is_named",
            "differential/test_defects.py::test_token_ids_that_overflow_are_named_by_the_first_of_them",
            "differential/test_defects.py::test_embedding_rows_that_cannot_be_compared_are_a_finding",
        ),
    ),
    (
        "An edit unties the head from the embedding and the file still has them tied; a reload "
        "drops a tensor that the config does not ask for.",
        "The tie is broken only where the recipe says so, and lineage names the head that did not "
        "follow; a tensor that no role of the config claims is refused.",
        (
            "edits/test_lm_head_spectrum.py::test_a_tie_is_not_broken_unasked",
            "differential/test_hazards.py::"
            "test_a_tie_that_the_edit_broke_and_the_conversion_did_not_is_named",
            "arch/test_identify.py::test_a_config_that_is_not_this_model_is_refused",
            "arch/test_identify.py::test_stock_transformers_reads_what_is_claimed",
        ),
    ),
)
"""What happens, what surgery does, and the tests by file and name."""


def page() -> str:
    """The text of `docs/hazards.md`."""
    rows = (
        f"| {what} | {answer} | {'<br>'.join(f'`{name}`' for name in map(_short, tests))} |"
        for what, answer, tests in HAZARDS
    )
    return _TEXT.format(rows="\n".join(rows))


def _short(test: str) -> str:
    return test.partition("::")[2]


def missing() -> list[str]:
    """Tests that are named and not there."""
    named = [test for _, _, tests in HAZARDS for test in tests]
    return [test for test in named if _short(test) not in _functions(test.partition("::")[0])]


def _functions(file: str) -> set[str]:
    path = TESTS / file
    tree = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module([], [])
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
