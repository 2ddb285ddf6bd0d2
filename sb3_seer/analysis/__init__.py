from sb3_seer.analysis.figures import plot_attention, plot_probe, plot_similarity
from sb3_seer.analysis.measures import debiased_cka, spatial_attention, svcca
from sb3_seer.analysis.run import AnalysedRun, Episodes
from sb3_seer.common.regression import held_out_r2

__all__ = [
    "AnalysedRun",
    "Episodes",
    "debiased_cka",
    "held_out_r2",
    "plot_attention",
    "plot_probe",
    "plot_similarity",
    "spatial_attention",
    "svcca",
]
