#!/bin/sh
# Asked before a package's scripts act upon a service: invoke-rc.d(8), deb-systemd-invoke(1p).
#
# usage: policy-rc.d [--quiet] SERVICE ACTION [RUNLEVEL]
#
# An update of Debian's nginx-common restarts Nginx, which fails whatever is under way. Here needrestart replaces it in
# place once the update is through, and site.yml starts it for the first time, in its sandbox.
set -eu

[ "$1" != --quiet ] || shift
case ${1%.service} in
    nginx)
        case $2 in
            start | restart | try-restart | upgrade) exit 101 ;;
        esac
        ;;
esac
