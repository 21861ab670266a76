"""Faults that users of other tools reported in public, and the tests that hold each as its whole kind."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Report:
    """A fault or a wish, once reported to another project."""

    thread: str
    """Where it was reported: project and number."""
    reported: str
    """What, in at most twelve words."""
    held_by: tuple[str, ...]
    """Test functions, `FILE::NAME` below this folder; `conformance: NAME` for a check that every method passes."""


REPORTS = (
    Report(
        "huggingface/trl#4719",
        "Averaging inside each micro-batch makes accumulation change the loss.",
        (
            "conformance: accumulation_gives_the_same_gradient",
            "test_callback.py::test_the_task_loss_is_a_mean_over_all_labels_however_the_rows_are_batched",
            "test_cases.py::test_a_short_last_window_is_divided_by_its_own_count",
        ),
    ),
    Report(
        "modelscope/ms-swift#10076, PR #10165",
        "A mean of micro-batch means overweighs short answers.",
        (
            "test_callback.py::test_two_processes_give_the_gradients_weights_and_logs_of_one",
            "test_cases.py::test_one_token_of_1_nat_and_three_of_3_are_2_5_on_average",
        ),
    ),
    Report(
        "MakazhanAlpamys/Soup#720",
        "The item count is ignored, so four accumulation steps quadruple the gradient.",
        (
            "test_callback.py::test_without_the_callback_accumulation_multiplies_the_gradient_of_a_bert_head",
            "test_cases.py::test_four_steps_of_accumulation_do_not_multiply_whatever_the_trainer_guesses",
        ),
    ),
    Report(
        "huggingface/trl PR #4105",
        "The mean also divides by the size of the vocabulary.",
        (
            "test_divergences.py::test_a_class_that_both_exclude_is_as_if_it_were_not_there",
            "test_cases.py::test_as_many_tokens_again_that_no_model_has_change_nothing",
        ),
    ),
    Report(
        "huggingface/transformers#1181",
        "A batch mean over sequences grows with their length.",
        ("test_cases.py::test_a_text_eight_times_as_long_has_the_same_loss",),
    ),
    Report(
        "neuralmagic/sparseml PR #592",
        "One divisor serves masked language models and fails other heads.",
        (
            "test_multi_label.py::test_each_label_has_its_own_divergence",
            "test_cases.py::test_each_kind_of_head_is_averaged_over_its_distributions",
        ),
    ),
    Report(
        "modelscope/easydistill#34",
        "The distillation term is divided twice and vanishes beside the task's.",
        (
            "test_callback.py::test_the_loss_is_the_weighed_sum_of_what_is_logged",
            "test_cases.py::test_a_teacher_that_is_sure_of_the_label_teaches_as_the_label",
        ),
    ),
    Report(
        "huggingface/trl PR #2058",
        "The first token of an answer is not scored.",
        (
            "test_cases.py::test_the_token_before_each_answer_token_is_scored_and_no_other",
            "test_cases.py::test_the_loss_reacts_where_answer_tokens_are_predicted_and_nowhere_else",
        ),
    ),
    Report(
        "modelscope/ms-swift PR #8436",
        "Nothing is shifted, and an empty slot of the teacher gives NaN.",
        (
            "conformance: nan_outside_what_is_scored_changes_nothing",
            "test_cases.py::test_what_a_teacher_gives_where_nothing_is_scored_is_not_read",
            "test_cases.py::test_a_server_that_leaves_the_last_place_out_teaches_as_its_model",
        ),
    ),
    Report(
        "peremartra/optipfair#34",
        "Padding takes part in every term of the loss.",
        (
            "conformance: padding_changes_nothing",
            "test_cases.py::test_padding_to_any_length_gives_one_gradient",
        ),
    ),
    Report(
        "huggingface/trl#1975, arcee-ai/DistillKit#18, meta-pytorch/torchtune#2007, huggingface/trl#2255",
        "Stored teacher outputs are wanted in place of a live teacher.",
        (
            "test_cache_teacher.py::test_it_teaches_what_the_model_teaches",
            "test_cache_teacher.py::test_the_model_runs_once_for_each_example_and_never_again",
            "test_cache_teacher.py::test_top_k_is_near_the_whole_and_bytes_are_few",
            "test_cases.py::test_stored_targets_follow_their_rows_into_any_order",
        ),
    ),
    Report(
        "axolotl-ai-cloud/axolotl PR #2700",
        "Likeliest tokens are chosen first and normalised among themselves.",
        (
            "test_cache_teacher.py::test_the_divergence_is_that_over_the_known_tokens_and_one_bucket",
            "test_cases.py::test_the_likeliest_tokens_keep_their_share_of_the_whole_vocabulary",
        ),
    ),
    Report(
        "haitongli/knowledge-distillation-pytorch#9, PR #16",
        "Targets computed in another order are given to the wrong rows.",
        (
            "test_cache_teacher.py::test_padding_and_order_do_not_change_an_example",
            "test_table_teacher.py::test_a_table_of_a_model_s_outputs_teaches_as_the_model_does",
            "test_cases.py::test_stored_targets_follow_their_rows_into_any_order",
        ),
    ),
    Report(
        "microsoft/LMOps PR #331, huggingface/trl#2215, #3028, PR #6252",
        "Vocabularies padded to different sizes end in a broadcasting error.",
        (
            "test_chunked.py::test_vocabularies_padded_otherwise_are_compared_where_both_are_real",
            "test_chunked.py::test_without_a_tokenizer_other_vocabularies_are_refused",
            "test_cases.py::test_a_masked_language_model_is_compared_where_both_vocabularies_are_real",
        ),
    ),
    Report(
        "huggingface/trl#4562",
        "A teacher with another tokenizer trains on without a word.",
        (
            "test_callback.py::test_a_tokenizer_of_equal_size_and_other_ids_is_refused",
            "test_cases.py::test_a_teacher_whose_tokenizer_gives_the_words_other_ids_is_refused",
        ),
    ),
    Report(
        "huggingface/trl#4392, PR #5885",
        "Aligning tokenizers breaks at a lone begin token and split letters.",
        (
            "test_method_alm.py::test_a_beginning_that_one_side_lacks_joins_the_next_chunk",
            "test_method_alm.py::test_messages_are_aligned_by_the_roles_of_both_families",
            "test_method_alm.py::test_tokens_of_every_kind_have_a_form_in_bytes",
            "test_cases.py::test_chunks_cover_the_text_in_equal_bytes_whoever_marks_its_beginning",
        ),
    ),
    Report(
        "huggingface/trl#7024",
        "Padding leaks into per-token advantages and their normalisation.",
        (
            "test_on_policy.py::test_prompts_end_at_the_first_label_and_are_padded_on_the_left",
            "test_on_policy.py::test_labels_end_with_the_first_end_and_the_prompt_is_not_scored",
            "test_cases.py::test_an_answer_has_the_same_values_whatever_it_is_padded_to",
        ),
    ),
    Report(
        "huggingface/sentence-transformers#3540, #1505",
        "Teacher scores squashed to 0–1 teach the student no separation.",
        (
            "test_callback.py::test_heads_without_a_softmax_are_refused_for_methods_that_compare_one",
            "test_cases.py::test_scores_of_a_teacher_that_are_squashed_already_are_told_once",
        ),
    ),
    Report(
        "axolotl-ai-cloud/axolotl#3270, PR #3271",
        "Evaluation crashes, and its loss is on another scale.",
        (
            "test_callback.py::test_evaluate_and_predict_see_the_students_own_loss_and_logits",
            "test_chunked.py::test_evaluation_in_between_sees_logits",
            "test_cases.py::test_evaluation_in_mid_training_is_on_the_scale_of_training",
        ),
    ),
    Report(
        "neuralmagic/sparseml PR #2191",
        "Training mode of the student wakes the teacher's dropout.",
        (
            "test_callback.py::test_the_teacher_stays_in_eval_mode_and_frozen_and_is_given_back",
            "test_teachers.py::test_its_dropout_is_off_for_the_teacher_and_as_it_was_for_the_student",
            "test_cases.py::test_no_frozen_model_is_ever_in_training_mode_or_in_the_optimizer",
        ),
    ),
    Report(
        "haitongli/knowledge-distillation-pytorch#25, lightly-ai/lightly-train PR #434",
        "The teacher's parameters keep asking for gradients.",
        (
            "conformance: a_step_changes_the_student_alone",
            "test_callback.py::test_the_teacher_stays_in_eval_mode_and_frozen_and_is_given_back",
            "test_cases.py::test_no_frozen_model_is_ever_in_training_mode_or_in_the_optimizer",
        ),
    ),
    Report(
        "huggingface/trl#2580, PR #6573",
        "Under sharded training the teacher stays on the wrong device.",
        ("test_cases.py::test_every_frozen_model_is_on_the_device_of_training",),
    ),
    Report(
        "open-mmlab/mmrazor#594",
        "Checkpoints hold the teacher beside the student.",
        (
            "conformance: the_saved_student_loads",
            "hub/test_push.py::test_entries_of_the_distiller_are_refused_and_strip_takes_them_out",
            "test_onnx.py::test_the_distillers_weights_in_a_checkpoint_are_left_out",
            "test_cases.py::test_a_checkpoint_in_mid_run_is_the_student_for_its_auto_class",
            "test_cases.py::test_set_ups_that_would_push_or_lose_what_is_trained_are_refused",
        ),
    ),
    Report(
        "unslothai/unsloth#11554, huggingface/trl PR #6526",
        "Both models' whole logits fill the memory.",
        (
            "test_chunked.py::test_chunks_give_what_whole_logits_give",
            "test_chunked.py::test_no_tensor_of_all_positions_and_the_vocabulary_is_made",
            "test_cases.py::test_logits_in_chunks_make_nothing_of_the_size_of_positions_by_vocabulary",
        ),
    ),
    Report(
        "arcee-ai/DistillKit#5",
        "Encoders are to be distilled too.",
        (
            "test_families.py::test_three_steps_teach_the_student_and_leave_a_plain_model",
            "test_families.py::test_four_micro_batches_of_one_row_give_the_gradient_of_one_batch",
        ),
    ),
    Report(
        "vllm-project/llm-compressor#1035, #2509",
        "Recovering a pruned model by distillation has no ready way.",
        (
            "test_shrinking.py::test_it_computes_what_the_teacher_without_the_other_layers_computes",
            "test_docs.py::test_the_python_of_the_readme_runs",
            "test_cases.py::test_a_teacher_without_half_of_its_layers_recovers",
        ),
    ),
    Report(
        "huggingface/transformers#12108, #36012, PR #36496",
        "A callback neither sees nor changes the loss.",
        (
            "test_callback.py::test_label_smoothing_is_refused_with_the_way_out",
            "test_callback.py::test_a_loss_function_of_the_users_is_refused_with_the_way_out",
            "test_callback.py::test_the_standard_loss_through_callback_loss_is_the_models_own",
            "test_callback.py::test_label_smoothing_works_through_callback_loss",
            "test_callback.py::test_a_trainer_that_ignores_the_loss_is_stopped_in_the_first_step",
            "test_cases.py::test_set_ups_that_would_push_or_lose_what_is_trained_are_refused",
            "test_cases.py::test_an_output_that_carries_a_loss_alone_is_refused",
        ),
    ),
    Report(
        "huggingface/transformers#43598, #31570",
        "Columns for the teacher are dropped, or break the student's forward.",
        (
            "test_callback.py::test_columns_of_the_teacher_reach_it_alone_in_training_and_evaluation",
            "test_cases.py::test_a_column_that_the_teacher_alone_reads_reaches_it_alone",
        ),
    ),
    Report(
        "huggingface/setfit PR #284",
        "The distillation trainer multiplies its number of steps.",
        ("test_callback.py::test_steps_epochs_and_learning_rates_are_those_of_a_plain_trainer",),
    ),
    Report(
        "huggingface/transformers#33807",
        "Tensors shared by student and teacher cannot be saved.",
        (
            "test_callback.py::test_a_student_that_shares_layers_with_its_teacher_is_refused",
            "test_shrinking.py::test_no_storage_is_shared_with_the_teacher_which_stays_as_it_was",
            "test_cases.py::test_a_tied_student_of_the_teacher_s_layers_saves_and_loads",
        ),
    ),
    Report(
        "huggingface/setfit#320",
        "Training asks for labels that distillation does not need.",
        (
            "test_callback.py::test_unlabelled_rows_are_distilled_and_left_out_of_the_task_loss",
            "test_families.py::test_rows_without_labels_are_distilled",
            "test_cases.py::test_a_data_set_of_token_ids_alone_is_enough",
        ),
    ),
    Report(
        "huggingface/setfit#342",
        "Teacher and student return arrays and tensors that do not mix.",
        (
            "test_callback.py::test_plain_modules_return_dicts_or_tuples",
            "test_callback.py::test_tuples_stay_tuples_of_the_same_fields",
            "test_cases.py::test_any_container_of_either_model_gives_one_gradient",
        ),
    ),
    Report(
        "intel/neural-compressor#785, huggingface/optimum-intel#372",
        "Shipped examples and advertised criteria do not run.",
        (
            "conformance: every_function_is_reached",
            "test_scripts.py::test_one_line_is_all_that_a_script_needs",
            "test_docs.py::test_the_python_of_the_readme_runs",
            "test_cases.py::test_a_method_trains_on_every_task_that_it_advertises",
            "test_cases.py::test_every_method_is_run_by_a_test",
        ),
    ),
    Report(
        "huggingface/optimum-onnx#114, #141",
        "No export for transformers 5 and its security fixes.",
        (
            "test_onnx.py::test_the_graph_gives_the_models_numbers_with_padding_on_either_side",
            "test_onnx.py::test_transformers_own_loader_reads_the_folder",
            "test_onnx_generation.py::test_a_language_model_generates_torchs_tokens",
        ),
    ),
    Report(
        "huggingface/optimum#1755, #449",
        "Logits differ by thousands, and the exporter prints that it succeeded.",
        (
            "test_onnx.py::test_a_corrupted_weight_fails_the_export_and_the_earlier_one_is_kept",
            "test_onnx_generation.py::test_a_corrupted_decoder_fails_the_export",
        ),
    ),
    Report(
        "huggingface/optimum#2241, PR #1326",
        "Tied weights are stored twice; the graph outweighs the checkpoint.",
        (
            "test_onnx.py::test_a_tied_masked_lm_stores_its_table_once_in_float32_and_in_int8",
            "test_onnx_generation.py::test_a_tied_language_model_in_8_bits_holds_its_table_once",
            "test_onnx_generation.py::test_the_decoders_weights_lie_outside_of_its_branches_once",
        ),
    ),
    Report(
        "huggingface/optimum#2233, #2246, #2008",
        "Of several graphs in a folder the wrong one is loaded.",
        (
            "test_onnx_generation.py::test_a_class_names_its_graphs",
            "test_onnx.py::test_int8_is_small_and_close",
            "test_onnx.py::test_what_was_measured_and_every_hash_stand_in_the_students_record",
        ),
    ),
    Report(
        "microsoft/onnxruntime#23372, #17801",
        "CUDA was asked for; the CPU ran, said by a log line.",
        (
            "test_onnx.py::test_a_provider_that_cannot_run_is_an_error",
            "test_onnx.py::test_a_provider_that_falls_back_in_silence_is_an_error",
        ),
    ),
    Report(
        "microsoft/onnxruntime#26996, huggingface/optimum#1402",
        "Two builds of one library side by side hide CUDA.",
        ("test_onnx.py::test_two_builds_of_onnxruntime_are_refused",),
    ),
    Report(
        "microsoft/onnxruntime#9599, #11286",
        "Int8 of a small encoder answers nearly at random.",
        (
            "test_onnx.py::test_a_missed_gate_keeps_the_earlier_int8",
            "test_onnx.py::test_a_nan_never_agrees",
            "test_onnx_generation.py::test_perplexity_alone_can_miss_the_gate",
        ),
    ),
    Report(
        "microsoft/onnxruntime#18945",
        "An optimised graph is far off where the plain one is right.",
        ("test_onnx_generation.py::test_a_way_that_misses_the_gate_is_undone_and_said",),
    ),
    Report(
        "huggingface/transformers#13528, huggingface/huggingface_hub PR #3000",
        "A null or a number in a card's metadata stops the push.",
        (
            "test_cards.py::test_what_the_hub_would_refuse_or_misread_is_left_out",
            "test_cards.py::test_a_folder_without_measurements_says_so_and_its_card_is_valid",
            "test_cards.py::test_no_text_of_a_stranger_becomes_markup",
        ),
    ),
    Report(
        "huggingface/evaluate#567, #315, #473, mlflow/mlflow PR #14731",
        "A metric by name needs the network, and hangs without it.",
        (
            "test_metrics.py::test_metrics_by_name_need_no_network_and_no_time",
            "test_metrics.py::test_a_missing_package_is_named_with_its_pip_line",
        ),
    ),
)


def render() -> str:
    """The table in Markdown."""
    lines = ["| reported | where | held by |", "|---|---|---|"]
    for report in REPORTS:
        held = "<br>".join(f"`{name}`" for name in report.held_by)
        lines.append(f"| {report.reported} | {report.thread} | {held} |")
    return "\n".join(lines)
