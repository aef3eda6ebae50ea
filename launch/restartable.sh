# shellcheck shell=bash
# Sourced by what starts runs under a scheduler: `restartable COMMAND ...` runs it and passes SIGTERM
# on. A run that is told to stop saves and ends well, though it is not done; its status here is then
# 75 ("try again" in sysexits.h), so that the scheduler can tell it from one that is.

restartable() {
  local stopped=0 code=0 run=
  trap 'stopped=75; [[ -z $run ]] || kill -TERM "$run"' TERM
  "$@" &
  run=$!
  if ((stopped)); then # before there was a run to pass it on to
    kill -TERM "$run"
  fi
  while code=0 && { wait "$run" || code=$?; } && kill -0 "$run" 2>/dev/null; do
    : # a signal ends `wait`, not the run
  done
  if ((stopped && code > 128)); then # of the `wait` that the signal ended as the run did
    code=0
    wait "$run" || code=$?
  fi
  return $((code ? code : stopped))
}
