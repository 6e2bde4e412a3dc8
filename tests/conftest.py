"One thread a process, the smallest size, and no chance of reaching out: the same for every test."
import os
os.environ.update(TOKBOOK_SIZE='ci', OMP_NUM_THREADS='1', MKL_NUM_THREADS='1', HF_HUB_OFFLINE='1', MPLBACKEND='agg', TOKENIZERS_PARALLELISM='false')
