from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecFrameStack


def find_n_stack(env: VecEnv) -> int:
    """
    :param env: environment of the algorithm, with images whose channels come first
    :return: the number of frames that its wrappers stack, 1 if they do not
    """
    n_channels: int = env.observation_space.shape[0]  # type: ignore[index]
    n_stack = 1
    venv = env
    while isinstance(venv, VecEnvWrapper):
        if isinstance(venv, VecFrameStack):
            n_stack = venv.stacked_obs.n_stack
        venv = venv.venv
    if n_stack == 1 and env.has_attr("stack_size"):  # gymnasium.wrappers.FrameStackObservation
        n_stack = env.get_attr("stack_size")[0]
    return n_stack if n_channels % n_stack == 0 else 1
