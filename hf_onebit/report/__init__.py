"""What quantization did, for people: tables, a summary, the model card, a plot. Plain dicts in, text out.

The report that ``OneBitQuantizer`` leaves is plain JSON with these keys. A value that is not known is None or
absent, and is then left out or said to be unknown, never made up:

    method, preset, planes or (of mpq) bits, group_size and symmetric, seed, command, versions {package: version}
    layers      {name: {in_features, out_features, planes, bits_per_weight, relative_weight_error,
                        relative_output_error or None, seconds}}; a head packed in groups: bits and group_size
                        in place of planes, and method "mpq"
    embeddings  the same of the token embedding, where it is packed
    untied      {reason, bytes}: head and embedding were one in the float model; what the second one takes
    skipped     {name: {reason, weights}}: linear layers that stay in floating point
    coverage    share of the weights of linear layers, output head apart, that are packed: 0 to 1
    linear_bpw, file_bpw             bits per weight of the packed layers, and of the whole file
    onebit_bpw                       of the packed layers without a head packed in groups
    float_bytes, file_bytes          size of the model in floating point, and of the weights on disk
    total_weights, seconds, peak_memory_mb
    calibration {source, tokens, sha256}
    allocation  {target, wanted, planned, tokens, depth_prior, cost, least_cost, layers}: how a target was turned into
                planes per layer (budget.py), or, with consistent_groups and heads, into bits (auto_bits.py), on text
                with the trials {tokens, attribution_tokens, chosen, plans [{how, planned, kl}]}; None without a target
    output_errors {inputs, tokens}   on which inputs relative_output_error was measured: those that the "packed model"
                or the "float model" gives its layers on so many tokens of the calibration data; None without data
    fit         None, or of a preset that tunes: drift {block: error of the hidden states}, blocks {block: {start, best,
                log [{epoch, loss_heldout}]}}, distillation {kl_before, kl_after, log [{tokens, kl_heldout}]}
    evaluations what ``hf-onebit eval --write-card`` measured, one entry a text

Relative errors are ‖difference‖² / ‖float‖² (Frobenius): of the weights, and of the layer's outputs without biases
(hf_onebit/quantization/layer_errors.py).
"""

from hf_onebit.report.card import measured_section, model_card
from hf_onebit.report.folder import REPORT_FOLDER, json_safe, write_report
from hf_onebit.report.plan import plan_summary
from hf_onebit.report.plots import (
    plot_curves,
    plot_drift,
    plot_layer_errors,
    plot_quality,
    plot_roofline,
    plot_tuning,
)
from hf_onebit.report.summary import coverage_line, layer_summary
from hf_onebit.report.table import format_table

__all__ = [
    "REPORT_FOLDER",
    "coverage_line",
    "format_table",
    "json_safe",
    "layer_summary",
    "measured_section",
    "model_card",
    "plan_summary",
    "plot_curves",
    "plot_drift",
    "plot_layer_errors",
    "plot_quality",
    "plot_roofline",
    "plot_tuning",
    "write_report",
]
