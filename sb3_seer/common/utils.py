from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecFrameStack

from sb3_seer.common.layout import image_spaces


def find_n_stack(env: VecEnv) -> int:
    """
    :param env: environment of the algorithm, with images whose channels come first (or a ``Dict`` with some)
    :return: the number of frames that its wrappers stack, 1 if they do not
    """
    n_stack = 1
    venv = env
    while isinstance(venv, VecEnvWrapper):
        if isinstance(venv, VecFrameStack):
            n_stack = venv.stacked_obs.n_stack
        venv = venv.venv
    if n_stack == 1 and env.has_attr("stack_size"):  # gymnasium.wrappers.FrameStackObservation
        stack_size = env.get_attr("stack_size")[0]
        n_stack = stack_size if isinstance(stack_size, int) and stack_size > 0 else 1
    images = image_spaces(env.observation_space).values()
    return n_stack if all(box.shape[0] % n_stack == 0 for box in images) else 1
