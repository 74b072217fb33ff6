"""What a trained model is worth: its likelihood bound in bits/dim, and what the analytic reverse variance needs."""

from diffkern.evaluation.analytic import estimate_eps_mean_square as estimate_eps_mean_square
from diffkern.evaluation.nll import evaluate_nll as evaluate_nll
from diffkern.evaluation.plot import plot_terms as plot_terms
from diffkern.evaluation.result import NllResult as NllResult
