# The agent: one static program. It is root where it runs, because it makes
# machines.
FROM scratch
ARG TARGETARCH
COPY --from=files ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY --from=files ${TARGETARCH}/depot-agent /usr/bin/depot-agent
ENTRYPOINT ["/usr/bin/depot-agent"]
CMD ["cloud"]
