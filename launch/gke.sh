#!/usr/bin/env bash
# Train on TPUs of a Google Kubernetes Engine cluster: as a JobSet, or through xpk.

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'TEXT'
Train on a TPU slice of a Google Kubernetes Engine cluster. The cluster, its TPU node pool (or
Autopilot) and the JobSet controller are there already: docs/tpu.md says how.

  launch/gke.sh VERB [options] [-- ARGUMENTS OF launch/run.py]

Build the image from the last commit, run on 16 v6e chips (four hosts), look, delete:

  image=us-docker.pkg.dev/my-project/my-repository/dinojax:a
  launch/gke.sh image --image $image
  launch/gke.sh run --name dinov3-a --image $image --accelerator tpu-v6e-slice --topology 4x4 \
    -- --config experiments/gram_vitl.py --workdir gs://my-bucket/runs/a
  launch/gke.sh logs --name dinov3-a
  launch/gke.sh delete --name dinov3-a

  image     build and push the image with Cloud Build        COSTS a few minutes of a build machine
  render    print the manifest, send nothing
  run       hand the manifest to the cluster                 COSTS MONEY where it makes nodes start
  xpk       the same through `xpk workload create`           COSTS MONEY as `run` does
  status    the JobSet and its pods
  logs      follow the output of the first host
  stop      suspend it: the pods save and end
  resume    after `stop`: the pods start again and go on
  delete    delete the JobSet, after a question; only one that this script has made

Nodes are paid for as long as they are there: Autopilot and autoscaled pools remove idle ones after
some minutes, pools of a fixed size never do. The JobSet starts again by itself after exit code 75
(saved), a preemption or a crash, and ends for good after 0 (done), 1 and 2 (would fail again).

  --name NAME                of the JobSet
  --image IMAGE              REGION-docker.pkg.dev/PROJECT/REPOSITORY/NAME:TAG
  --accelerator LABEL        tpu-v6e-slice, tpu-v5p-slice, tpu-v5-lite-podslice, tpu-v4-podslice
  --topology AxB[xC]         chips of the slice: 4x4 on v5e and v6e, 2x2x4 on v4 and v5p
  --chips-per-host N         (default: 4; of smaller slices all)
  --spot                     on spot nodes, much cheaper, can be taken away at any moment
  --service-account NAME     Kubernetes service account that may use the bucket (Workload Identity)
  --queue NAME               local queue of Kueue
  --namespace NAME           (default: default)
  --context NAME             of kubectl (default: its present one)
  --restarts N               (default: 50)
  --cluster NAME, --type v6e-16, --zone ZONE, --project ID    for xpk
  --allow-dirty              build the last commit although files differ from it
  --yes                      no questions
  --dry-run                  print the commands, send none
TEXT
}

name="" image="" accelerator="" topology="" chips_per_host="" service_account="" queue=""
namespace=default context="" restarts=50 cluster="" type="" zone="" project=""
spot=no
manager=dinojax-launch # label of all that this script makes; it deletes nothing else
grace=120              # seconds between SIGTERM and the end, for the save

kube() { send kubectl ${context:+"--context=$context"} "--namespace=$namespace" "$@"; }

# ---- the image ----------------------------------------------------------------------------------

dockerfile() {
  cat <<'TEXT'
FROM python:3.12-slim
WORKDIR /dinojax
COPY . .
RUN pip install --no-cache-dir --editable '.[tpu,cloud]'
TEXT
}

image() {
  require image
  check_tree
  need gcloud "https://cloud.google.com/sdk/docs/install"
  scratch_directory
  if [[ $dry_run == yes ]]; then
    printf "mkdir -p %s\ncat > %s/Dockerfile <<'TEXT'\n%s\nTEXT\n" \
      "$scratch" "$scratch" "$(dockerfile)"
  else
    dockerfile > "$scratch/Dockerfile"
  fi
  pack_code "$scratch/code.tar.gz" "--add-file=$scratch/Dockerfile"
  send gcloud builds submit "$scratch/code.tar.gz" "--tag=$image" ${project:+"--project=$project"}
}

# ---- the manifest -------------------------------------------------------------------------------

# Sets hosts and chips_per_host from the topology.
count_hosts() {
  local chips=1 side
  if [[ $accelerator != tpu* ]]; then
    die "--accelerator $accelerator is not a label of GKE; for example tpu-v6e-slice"
  fi
  if [[ ! $topology =~ ^[0-9]+x[0-9]+(x[0-9]+)?$ ]]; then
    die "--topology $topology is not of the form 4x4 or 2x2x4"
  fi
  for side in ${topology//x/ }; do chips=$((chips * side)); done
  chips_per_host=${chips_per_host:-$((chips < 4 ? chips : 4))}
  check_number chips-per-host
  if ((chips_per_host < 1 || chips % chips_per_host)); then
    die "--chips-per-host $chips_per_host does not divide the $chips chips of" \
      "--topology $topology; nearest: 4"
  fi
  hosts=$((chips / chips_per_host))
}

# yaml WORD: a quoted scalar. Kubernetes would put variables in place of $(NAME).
yaml() {
  local word=${1//\'/\'\'}
  printf "'%s'\n" "${word//\$(/\$\$(}"
}

# TPU_WORKER_HOSTNAMES, by which the hosts find each other, is filled in by GKE from the headless
# service that `network` makes; python is the container's first process, so SIGTERM reaches it.
render() {
  local word
  count_hosts
  cat <<TEXT
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  namespace: $namespace
  labels:
    app.kubernetes.io/managed-by: $manager
TEXT
  if [[ -n $queue ]]; then echo "    kueue.x-k8s.io/queue-name: $queue"; fi
  cat <<TEXT
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  network:
    enableDNSHostnames: true
    subdomain: $name
  failurePolicy:
    maxRestarts: $restarts
    rules:
      - name: wouldFailAgain
        action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice
      replicas: 1
      template:
        spec:
          parallelism: $hosts
          completions: $hosts
          completionMode: Indexed
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes:
                  containerName: train
                  operator: In
                  values: [1, 2]
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: $grace
TEXT
  if [[ -n $service_account ]]; then echo "              serviceAccountName: $service_account"; fi
  cat <<TEXT
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $accelerator
                cloud.google.com/gke-tpu-topology: $topology
TEXT
  if [[ $spot == yes ]]; then echo '                cloud.google.com/gke-spot: "true"'; fi
  cat <<TEXT
              tolerations:
                - {key: google.com/tpu, operator: Exists}
TEXT
  if [[ $spot == yes ]]; then
    echo "                - {key: cloud.google.com/gke-spot, operator: Exists}"
  fi
  cat <<TEXT
              containers:
                - name: train
                  image: $(yaml "$image")
                  workingDir: /dinojax
                  command: [python, launch/run.py]
                  args:
TEXT
  for word in "${run_args[@]}"; do echo "                    - $(yaml "$word")"; done
  cat <<TEXT
                  ports:
                    - containerPort: 8471 # between the chips' hosts
                    - containerPort: 8482 # the hosts' meeting point
                  resources:
                    limits:
                      google.com/tpu: $chips_per_host
TEXT
}

run() {
  local manifest
  manifest=$(render)
  if [[ $dry_run == yes ]]; then
    printf "%s <<'TEXT'\n%s\nTEXT\n" "$(kube apply --filename=- 3>&1)" "$manifest"
  else
    kube apply --filename=- <<< "$manifest"
    say "follow it: $script logs --name $name; nodes that it starts cost until they are gone"
  fi
}

# ---- through xpk --------------------------------------------------------------------------------

through_xpk() {
  local capacity=()
  require cluster type
  need xpk "pip install xpk"
  if [[ $spot == yes ]]; then capacity=(--spot); fi
  send xpk workload create "--workload=$name" "--cluster=$cluster" "--tpu-type=$type" \
    --num-slices=1 "--docker-image=$image" "--max-restarts=$restarts" --restart-on-exit-codes=75 \
    "--termination-grace-period-seconds=$grace" "${capacity[@]}" \
    ${zone:+"--zone=$zone"} ${project:+"--project=$project"} \
    "--command=cd /dinojax && exec python launch/run.py $(quoted "${run_args[@]}")"
}

# ---- afterwards ---------------------------------------------------------------------------------

status() {
  kube get jobset "$name"
  kube get pods "--selector=jobset.sigs.k8s.io/jobset-name=$name" --output=wide
}

logs() {
  kube logs --follow --tail=-1 \
    "--selector=jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0"
}

suspend() { kube patch jobset "$name" --type=merge "--patch={\"spec\":{\"suspend\":$1}}"; }
stop() { suspend true; }
resume() { suspend false; }

delete() {
  local owner
  owner=$(kube get jobset "$name" \
    '--output=jsonpath={.metadata.labels.app\.kubernetes\.io/managed-by}')
  if [[ $dry_run == no && $owner != "$manager" ]]; then
    die "$name was not made by this script (it has no label $manager); nothing was deleted"
  fi
  note "if that answers $manager:"
  confirm "delete the JobSet $name in $namespace? Its pods save and end."
  kube delete jobset "$name"
}

# ---- the command line ---------------------------------------------------------------------------

main() {
  local takes="name image accelerator topology chips-per-host service-account queue namespace"
  takes+=" context restarts cluster type zone project"
  take_verb "image render run xpk status logs stop resume delete" "$@"
  parse "$takes" "spot" "${@:2}"
  check_number restarts
  if [[ $verb != image ]]; then
    require name
    check_name "$name"
  fi
  case $verb in
    render | run)
      require image accelerator topology
      check_run_args
      check_shared_workdir
      ;;
    xpk)
      require image
      check_run_args
      check_shared_workdir
      ;;
  esac
  case $verb in
    run | status | logs | stop | resume | delete)
      need kubectl "https://kubernetes.io/docs/tasks/tools/"
      ;;
  esac
  if [[ $verb == xpk ]]; then through_xpk; else "$verb"; fi
}

main "$@"
