#!/bin/sh
# Measures one PPO step of TRL 0.22.2: sh run.sh VENV --model FOLDER --prompts FILE --out FILE [--inner-epochs 4]
# Makes the virtual environment VENV (about 1.5 GB) unless it is complete, then runs step.py in it on two threads.
# Where PyPI gives a CUDA build of torch, make the first install from https://download.pytorch.org/whl/cpu.
set -eu
venv=${1:?folder of the virtual environment}
shift
torch=torch==2.13.0
rest="trl==0.22.2 transformers==4.57.6 peft==0.17.1 accelerate==1.10.1 datasets==4.0.0"
if [ ! -e "$venv/complete" ]; then
    "${PYTHON:-python3.11}" -m venv "$venv"
    "$venv/bin/pip" install --no-compile "$torch" # alone and first, so that nothing else decides which torch this is
    "$venv/bin/pip" install --no-compile "$torch" $rest
    touch "$venv/complete"
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false
exec "$venv/bin/python" "$(dirname "$0")/step.py" "$@"
