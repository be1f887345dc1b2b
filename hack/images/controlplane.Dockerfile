# The control plane: one static program. Its state is /var/lib/depot.
FROM scratch
ARG TARGETARCH
COPY --from=files ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY --from=files ${TARGETARCH}/depot-controlplane /usr/bin/depot-controlplane
# SQLite's scratch files, and the state, belong to the user below.
COPY --from=files --chown=65532:65532 empty /tmp
COPY --from=files --chown=65532:65532 empty /var/lib/depot
USER 65532:65532
VOLUME /var/lib/depot
ENTRYPOINT ["/usr/bin/depot-controlplane"]
CMD ["serve"]
