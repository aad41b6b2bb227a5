#!/bin/sh
# How the job $1 stands: running, success or failed, the three words that Snakemake wants; why it failed goes to stderr.
if ! state=$(scontrol --oneliner show job "$1" 2>&1); then
    case $state in
    *"Invalid job id"*) echo "job $1: SLURM has forgotten it; was it over before Snakemake asked?" >&2; echo failed ;;
    *) echo running ;; # no answer now: ask again
    esac
    exit
fi
state=${state#*JobState=}
state=${state%% *}
case $state in
COMPLETED) echo success ;;
PENDING | CONFIGURING | RUNNING | COMPLETING | SUSPENDED | REQUEUED | RESIZING | STAGE_OUT | SIGNALING | STOPPED) echo running ;;
TIMEOUT) echo "job $1: TIMEOUT, over its runtime; give it more with --set-resources RULE:runtime=12h" >&2; echo failed ;;
*) echo "job $1: $state" >&2; echo failed ;;
esac
