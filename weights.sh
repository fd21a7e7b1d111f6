#!/usr/bin/env bash
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
    cat <<'EOF'
weights.sh [SIZE] [--only dinov3|vgg16|inception] [--repo OWNER/NAME]

Downloads to weights/ what training and evaluation read:
  dinov3-SIZE.safetensors               the encoder: s, splus, b, l, hplus (default, 3.4 GB) or 7b (27 GB)
  vgg16-397923af.pth                    torchvision's VGG16, for LPIPS (0.5 GB)
  pt_inception-2015-12-05-6726825d.pth  FID's Inception, from pytorch-fid (0.1 GB)

eval.py --fd timm:NAME downloads its network by itself. The field reports vit_large_patch14_dinov2.lvd142m,
vit_large_patch14_clip_224.openai and vit_large_patch16_224.mae.

  --only WHAT        one of the three
  --repo OWNER/NAME  the encoder's repository on the hub, instead of timm's copy, which asks for no token: its
                     model.safetensors alone, under SIZE's name.
                     For facebook/dinov3-vith16plus-pretrain-lvd1689m, say, HF_TOKEN must hold the token of
                     an account that has accepted the licence

A download goes to FILE.part, resumes there when it is run again, and becomes FILE once its SHA-256 is right.
A file that is already there is checked and kept, wherever it came from. DINOv3's weights have a licence of
their own, apart from this project's.

Mirrors: HF_ENDPOINT (instead of https://huggingface.co), TORCH_ENDPOINT (https://download.pytorch.org) and
GITHUB_ENDPOINT (https://github.com). Proxies: https_proxy, as curl reads it.
EOF
}

say() { printf '%s\n' "$*" >&2; }
die() { say "weights.sh: $*"; exit 1; }

# A line of curl's configuration with the token, for addresses of the hub. It goes to curl through a pipe,
# because every user of a machine can read its command lines. curl drops the token when it is redirected to
# another host.
authorization() {       # URL
    if [[ -n ${HF_TOKEN:-} && $1 == "$HF_ENDPOINT"/* ]]; then
        printf 'header = "Authorization: Bearer %s"\n' "$HF_TOKEN"
    fi
}

sha256() {              # file
    # macOS has no sha256sum, but shasum.
    if command -v sha256sum >/dev/null; then
        sha256sum <"$1"
    else
        shasum -a 256 <"$1"
    fi | cut -d ' ' -f 1
}

bytes() {               # file
    if [[ -f $1 ]]; then
        wc -c <"$1" | tr -d ' '
    else
        echo 0
    fi
}

# One sentence for curl's exit status and the last HTTP status.
problem() {             # curl's status, HTTP status, URL
    local url=$3 host=${3#*://} what again="run it again, it resumes"
    host=${host%%/*}
    case $1,$2 in
        22,401 | 22,403)
            what="$url is not open to you (HTTP $2): accept its licence on its page and set HF_TOKEN" ;;
        22,404) what="$url does not exist (HTTP 404): check the size, --repo and the mirror's address" ;;
        22,*) what="$url was refused with HTTP $2: try again later or set a mirror, see --help" ;;
        23,*) what="the disk is full or weights/ cannot be written to: make room and $again" ;;
        5,* | 6,* | 7,* | 28,000)
            what="no connection to $host: check the network or set a mirror, see --help" ;;
        35,* | 51,* | 58,* | 60,* | 77,*)
            what="no secure connection to $host (curl error $1): check the clock" ;;
        *) what="the connection to $host broke off again and again (curl error $1): $again" ;;
    esac
    say "weights.sh: $what"
}

# The SHA-256 that the hub declares for a file, or nothing: X-Linked-Etag, else an ETag of 64 hex digits in
# the hub's own answer, since the storage behind it may use such tags for other hashes. It is asked for with a
# GET of the first byte, because storage may sign its addresses for GET alone; the size limit is for servers
# that ignore the range.
declared_sha256() {     # URL
    local answer headers status attempt
    for attempt in 1 2 3; do
        status=0
        answer=$(authorization "$1" | curl -sfL -K - --connect-timeout 20 --max-time 60 \
                 --range 0-0 --max-filesize 1000 --suppress-connect-headers \
                 -D - -o /dev/null -w 'status %{http_code}' "$1") || status=$?
        case $status,${answer##*status } in
            0,* | 63,*) break ;;
            22,40?) attempt=3 ;;                        # refused: asking again does not help
        esac
        if ((attempt == 3)); then
            problem "$status" "${answer##*status }" "$1"
            return 1
        fi
        sleep 1
    done
    headers=$(tr -d '\r"' <<<"$answer" | tr 'A-Z' 'a-z')
    # Not head, which may end before the second sed has written.
    { sed -n 's/^x-linked-etag: *\([0-9a-f]\{64\}\)$/\1/p' <<<"$headers"
      sed -n -e '/^$/q' -e 's/^etag: *\([0-9a-f]\{64\}\)$/\1/p' <<<"$headers"; } | sed -n 1p
}

# Download a URL to FILE.part from where it stands. A broken connection is taken up again as long as each
# attempt gets further than all before it; five that do not end it.
download() {            # URL, part
    local url=$1 part=$2 status http best left=5 progress=-s
    if [[ -t 2 ]]; then progress=--progress-bar; fi
    best=$(bytes "$part")
    while true; do
        status=0
        http=$(authorization "$url" | curl -fL "$progress" -K - --connect-timeout 20 \
               --speed-limit 1 --speed-time 60 -C - -o "$part" -w '%{http_code}' "$url") || status=$?
        case $status,$http in
            0,* | 22,416) return ;;                     # 416: nothing is left to send, the checksum will tell
            33,*) rm -f "$part" ;;                      # the server cannot resume: from the start
            22,429 | 22,5??) ;;                         # busy
            22,* | 23,* | 35,* | 51,* | 58,* | 60,* | 77,*) problem "$status" "$http" "$url"; return 1 ;;
        esac
        if (($(bytes "$part") > best)); then
            best=$(bytes "$part") left=5
        elif ((--left == 0)); then
            problem "$status" "$http" "$url"
            return 1
        fi
        sleep 1
    done
}

# A file in weights/: kept if it is there, else downloaded and checked.
get() {                 # name, URL, SHA-256 or its first digits; without them the hub is asked
    local file=weights/$1 url=$2 expected=${3:-} found
    if [[ -e $file ]]; then
        if [[ -z $expected ]] && ! expected=$(declared_sha256 "$url"); then
            say "$file is there; kept unchecked"
            return
        fi
        found=$(sha256 "$file")
        if [[ -n $expected && $found != "$expected"* ]]; then
            die "$file is there with SHA-256 $found, but $url has $expected:" \
                "move it away to download that one"
        elif [[ -n $expected ]]; then
            say "$file is there, SHA-256 is right"
        else
            say "$file is there; kept unchecked"
        fi
        return
    fi
    if [[ -z $expected ]]; then
        expected=$(declared_sha256 "$url") || exit 1
        if [[ -z $expected ]]; then
            die "$url comes without a SHA-256: use another HF_ENDPOINT or put the file at $file yourself"
        fi
    fi
    mkdir -p weights 2>/dev/null || die "cannot create the folder weights/ here"
    say "$file from $url"
    download "$url" "$file.part" || exit 1
    found=$(sha256 "$file.part")
    if [[ $found != "$expected"* ]]; then
        rm -f "$file.part"
        die "$url arrived with SHA-256 $found instead of $expected and was deleted:" \
            "run it again or use another mirror"
    fi
    mv "$file.part" "$file"
    say "$file is complete, SHA-256 is right"
}

size=hplus only= repo=
while (($#)); do
    case $1 in
        -h | --help) usage; exit ;;
        --only | --repo)
            [[ -n ${2:-} ]] || die "$1 needs a value, see --help"
            if [[ $1 == --only ]]; then
                only=$2
            else
                repo=$2
            fi
            shift ;;
        -*) die "unknown option $1, see --help" ;;
        *) size=$1 ;;
    esac
    shift
done
case $size in
    s) name=small ;;
    splus) name=small_plus ;;
    b) name=base ;;
    l) name=large ;;
    hplus) name=huge_plus ;;
    7b) name=7b ;;
    *) die "unknown size '$size': s, splus, b, l, hplus or 7b" ;;
esac
case $only in
    '' | dinov3 | vgg16 | inception) ;;
    *) die "--only takes dinov3, vgg16 or inception, not '$only'" ;;
esac
[[ -z $repo || $repo == */* ]] || die "--repo takes OWNER/NAME, not '$repo'"
command -v curl >/dev/null || die "curl is needed and not installed"
HF_ENDPOINT=${HF_ENDPOINT:-https://huggingface.co}
TORCH_ENDPOINT=${TORCH_ENDPOINT:-https://download.pytorch.org}
GITHUB_ENDPOINT=${GITHUB_ENDPOINT:-https://github.com}
trap 'say "weights.sh: interrupted; run it again, it resumes"; exit 130' INT

if [[ -z $only || $only == dinov3 ]]; then
    say "DINOv3's weights are under Meta's DINOv3 License," \
        "https://ai.meta.com/resources/models-and-libraries/dinov3-license/"
    repo=${repo:-timm/vit_${name}_patch16_dinov3.lvd1689m}
    [[ $repo != *sat493m* ]] || die "$repo takes images of another mean and std: put its weights and its" \
        "config.json or preprocessor_config.json into a folder of their own, for --encoder"
    get "dinov3-$size.safetensors" "$HF_ENDPOINT/$repo/resolve/main/model.safetensors"
fi
if [[ -z $only || $only == vgg16 ]]; then
    get vgg16-397923af.pth "$TORCH_ENDPOINT/models/vgg16-397923af.pth" 397923af
fi
if [[ -z $only || $only == inception ]]; then
    file=pt_inception-2015-12-05-6726825d.pth
    get "$file" "$GITHUB_ENDPOINT/mseitzer/pytorch-fid/releases/download/fid_weights/$file" 6726825d
fi
